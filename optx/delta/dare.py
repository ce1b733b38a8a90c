"""DARE merging: drop most of every change at random, rescale the rest, and add or elect.

Source: Language Models are Super Mario (DARE), arXiv 2311.03099.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from optx._buffers import PIECE
from optx._errors import OptxError, check_choice
from optx.delta._combine import steady_rows
from optx.delta._entrywise import Entrywise, magnitudes
from optx.delta._kept import Kept, Mask
from optx.delta._merge_method import ByPieces, Changes, Combine, MergeMethod, OfPiece
from optx.delta._options import CONVENTIONS, Convention, PerModel, numbers, per_model
from optx.delta._random_mask import Dropout, key_of

Masks = Callable[[str], Sequence[Dropout | Mask | None]]
"""By name, a tensor's mask for each model; None keeps all."""


@dataclass(frozen=True)
class _DARE(MergeMethod):
    """What both have: pruning each change before it is merged."""

    p: PerModel = 0.9
    lam: float = 1.0
    weights: PerModel = 1.0
    seed: int = 0
    rescale: Literal["paper", "l1", "none"] | None = None
    normalize: bool = False
    convention: Convention = "paper"

    _elects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for p in numbers(self.p):
            if not 0 <= p < 1:
                raise OptxError(
                    f"{owner}: p is {p!r}; it must be in [0, 1). p is the share DROPPED: 0.9 keeps a tenth."
                )
        check_choice(owner, "rescale", self.rescale, ("paper", "l1", "none", None))
        check_choice(owner, "convention", self.convention, CONVENTIONS)

    def prepare(self, changes: Changes) -> Combine:
        """Prune, then add or elect; needs to know nothing beforehand."""
        owner, n = type(self).__name__, changes.models
        weights, rates = per_model(owner, "weights", self.weights, n), per_model(owner, "p", self.p, n)
        rescale = self.rescale or ("paper" if self.convention == "paper" else "l1")
        masks = _masks_in_turn(changes, rates) if self._draws_in_turn else _masks_by_name(rates, self.seed)

        def of(name: str) -> OfPiece:
            kept = [Kept(mask) for mask in masks(name)]
            kept = rescaled(changes.only(name), kept, rates, rescale)
            return Entrywise(kept, weights, self.normalize, self.lam, int(self._elects))

        return ByPieces(of)

    @property
    def _draws_in_turn(self) -> bool:
        return self.convention == "mergekit" and self.seed < 0

    def mark(self) -> str:
        """With the generator's state, if its numbers are used."""
        state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).hexdigest()
        return f"{self!r} {state}" if self._draws_in_turn else repr(self)


@dataclass(frozen=True)
class DARELinear(_DARE):
    """Drop entries of each change at random, rescale the rest, and add them up (DARE with task arithmetic).

    base + lam * sum of w_i m_i (model_i - base) / (1 - p), m_i being 0 with probability p, else 1.

    Args:
        p: share of the entries DROPPED, in [0, 1); one number for each model, or for all. mergekit's YAML
            has the share that is kept: ``density: 0.1`` there is ``p=0.9`` here.
        lam: scale of the merged change.
        weights: one number for each model, or one for all.
        seed: of the masks. They depend on it, on the model's place in the list (model i has the mask of
            ``Delta.dare(p, seed=seed + i)``) and on the tensor's name; never on order, device or threads.
        rescale: what is kept is divided by 1 - p (``"paper"``), scaled to the L1 norm that the tensor's
            change had (``"l1"``), or left (``"none"``). None: the convention's.
        normalize: divide by the sum of the weights.
        convention: ``"paper"``, or ``"mergekit"``: rescale is l1. With ``seed=-1`` that also draws masks as
            mergekit does, from torch's global generator, tensor by tensor and model by model.

    Paper values:
        ``p=0.9``: one model, RoBERTa-base on GLUE and WizardMath-7B on GSM8K (the default).
        ``p=0.2, lam=1.0``: WizardLM-13B and WizardMath-13B merged (authors' README).

    Limits: Random: another seed is another model. At a p of 0.99 small models lose much; see `Delta.find_q`.

    Keywords: DARE, dare_linear, merging, sparse, dropping.

    Evidence: ``optx run merge``; ``test_merge.py``, ``test_merge_peers.py``.

    Raises:
        OptxError: an option out of range; at merge, another number of weights than of models.

    Example:
        >>> import torch, optx
        >>> base, tuned = {"w": torch.zeros(10_000)}, {"w": torch.ones(10_000)}
        >>> merged = optx.merge(base, [tuned], optx.DARELinear(p=0.75))["w"]
        >>> merged.unique().tolist(), round(float(merged.mean()), 1)
        ([0.0, 4.0], 1.0)

    Source: arXiv 2311.03099, section 3.
    """


@dataclass(frozen=True)
class DARETIES(_DARE):
    """Drop entries of each change at random, rescale the rest, and add up those whose sign is elected.

    As `DARELinear`, without the entries whose sign is not that of their weighted sum over the models.

    Args:
        p: share of the entries DROPPED, in [0, 1); one number for each model, or for all. mergekit's YAML
            has the share that is kept: ``density: 0.1`` there is ``p=0.9`` here.
        lam: scale of the merged change.
        weights: one number for each model, or one for all; they count in the election.
        seed: of the masks; see `DARELinear`.
        rescale: ``"paper"``, ``"l1"`` or ``"none"``; see `DARELinear`.
        normalize: divide by the weights of the models that take part, entry by entry.
        convention: ``"paper"`` or ``"mergekit"``; see `DARELinear`.

    Paper values:
        ``p=0.9``: DARE's drop rate for one model (the default). DARE's authors drop first and merge as TIES
            does after; TIES's own trimming is off here.

    Limits: Random: another seed is another model.

    Keywords: DARE, dare_ties, merging, sparse, dropping.

    Evidence: ``optx run merge``; ``test_merge.py``, ``test_merge_peers.py``.

    Raises:
        OptxError: an option out of range; at merge, another number of weights than of models.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(3)}
        >>> models = [{"w": torch.tensor([1.0, -1.0, 2.0])}, {"w": torch.tensor([2.0, 3.0, 0.0])}]
        >>> optx.merge(base, models, optx.DARETIES(p=0.0))["w"]
        tensor([3., 3., 2.])

    Source: arXiv 2311.03099, section 3, with the election of arXiv 2306.01708.
    """

    _elects: ClassVar[bool] = True


def rescaled(changes: Changes, kept: Sequence[Kept], rates: Sequence[float], rescale: str) -> list[Kept]:
    """What is kept of one tensor's changes, with its scales."""
    pruned = [one.by is not None for one in kept]
    if rescale == "none" or not any(pruned):
        return list(kept)
    if rescale == "paper":
        scaled = zip(kept, rates, strict=True)
        return [one if one.by is None else replace(one, divisor=1 - p) for one, p in scaled]
    norms = zip(*_norms(changes, kept), strict=True)
    return [
        # mergekit's bounds
        replace(one, factor=old / new) if one.by is not None and old >= 1e-7 and new >= 1e-7 else one
        for one, old, new in zip(kept, *norms, strict=True)
    ]


def _norms(changes: Changes, kept: Sequence[Kept]) -> list[list[float]]:
    """For each model the L1 norm of its change of one tensor, and that of what is kept."""
    [(name, entry)] = changes.entries.items()
    raw = changes.raw(name)
    found = magnitudes(kept, raw, entry.numel, changes.step) if raw is not None else None
    if found is not None:
        return found
    rows = [([0.0], [0.0]) for _ in kept]
    for _, begin, tensors in changes.pieces():
        for one, tensor, (before, after) in zip(kept, tensors, rows, strict=True):
            before += steady_rows(tensor.abs())
            after += steady_rows(one.chosen(tensor, begin).abs())
    return [[math.fsum(before), math.fsum(after)] for before, after in rows]


def _masks_by_name(rates: Sequence[float], seed: int) -> Masks:
    return lambda name: [
        Dropout(key_of(seed + i, name), p, 1 - p) if p else None for i, p in enumerate(rates)
    ]


def _masks_in_turn(changes: Changes, rates: Sequence[float]) -> Masks:
    """From torch's generator, for every tensor in turn, those that nobody asks for too (a merge that goes
    on where another stopped)."""
    turn = iter(changes.entries.items())

    def masks(name: str) -> Sequence[Mask | None]:
        for now, entry in turn:
            drawn = [_drawn(entry.numel, 1 - p) if p else None for p in rates]
            if now == name:
                return drawn
        raise OptxError(f"DARE: {name!r} is asked for out of turn; give a seed of 0 or more.")

    return masks


def _drawn(numel: int, share: float) -> Mask:
    kept = torch.empty(numel, dtype=torch.bool)
    for part in kept.split(PIECE):  # the generator's numbers are the same for any parts
        part.copy_(torch.bernoulli(torch.full(part.shape, share)))
    return lambda begin, piece: kept[begin : begin + len(piece)]
