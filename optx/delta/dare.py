"""DARE merging: drop most of every change at random, rescale the rest, and add or elect.

Source: Language Models are Super Mario (DARE), arXiv 2311.03099.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.delta._combine import PerModel, check_choice, elected, mixed, numbers, per_model, steady_sum
from optx.delta._mask import Dropout, key_of
from optx.delta.merge import Changes, Combine, MergeMethod

Masks = Callable[[str, Sequence[Tensor]], Sequence[Tensor | None]]
"""For each model, which entries of a tensor are kept; None keeps all."""


@dataclass(frozen=True)
class _DARE(MergeMethod):
    """What both have: pruning each change before it is merged."""

    p: PerModel = 0.9
    lam: float = 1.0
    weights: PerModel = 1.0
    seed: int = 0
    rescale: Literal["paper", "l1", "none"] | None = None
    normalize: bool = False
    convention: Literal["paper", "mergekit"] = "paper"

    _elects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for p in numbers(self.p):
            if not 0 <= p < 1:
                raise OptxError(
                    f"{owner}: p is {p!r}; it must be in [0, 1). p is the share DROPPED: 0.9 keeps a tenth."
                )
        check_choice(owner, "rescale", self.rescale, ("paper", "l1", "none", None))
        check_choice(owner, "convention", self.convention, ("paper", "mergekit"))

    def prepare(self, changes: Changes) -> Combine:
        """Prune, then add or elect; needs to know nothing beforehand."""
        owner, n = type(self).__name__, changes.models
        weights, rates = per_model(owner, "weights", self.weights, n), per_model(owner, "p", self.p, n)
        rescale = self.rescale or ("paper" if self.convention == "paper" else "l1")
        masks = _masks_in_turn(changes, rates) if self._draws_in_turn else _masks_by_name(rates, self.seed)

        def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
            kept = [
                pruned(change, keep, p, rescale)
                for change, keep, p in zip(tensors, masks(name, tensors), rates, strict=True)
            ]
            merged = elected if self._elects else mixed
            return merged(kept, weights, self.normalize, self.lam)

        return combine

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

    Args:
        p: share of the entries DROPPED, in [0, 1); one number for each model, or for all.
        lam: scale of the merged change.
        weights: one number for each model, or one for all.
        seed: of the masks. They depend on it, on the model's place in the list (model i has the mask of
            ``Delta.dare(p, seed=seed + i)``) and on the tensor's name; never on order, device or threads.
        rescale: what is kept is divided by 1 - p (``"paper"``), scaled to the L1 norm that the tensor's
            change had (``"l1"``), or left (``"none"``). None: the convention's.
        normalize: divide by the sum of the weights.
        convention: ``"paper"``, or ``"mergekit"``: rescale is l1. With ``seed=-1`` that also draws masks as
            mergekit does, from torch's global generator, tensor by tensor and model by model.

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

    Args:
        p: share of the entries DROPPED, in [0, 1); one number for each model, or for all.
        lam: scale of the merged change.
        weights: one number for each model, or one for all; they count in the election.
        seed: of the masks; see `DARELinear`.
        rescale: ``"paper"``, ``"l1"`` or ``"none"``; see `DARELinear`.
        normalize: divide by the weights of the models that take part, entry by entry.
        convention: ``"paper"`` or ``"mergekit"``; see `DARELinear`.

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


def pruned(change: Tensor, keep: Tensor | None, p: float, rescale: str) -> Tensor:
    """What is kept of a change, rescaled."""
    if keep is None:
        return change
    masked = torch.where(keep.to(change.device), change, 0.0)
    if rescale == "paper":
        return masked.div_(1 - p)
    if rescale == "l1":
        before, after = steady_sum(change.abs()), steady_sum(masked.abs())
        if before >= 1e-7 and after >= 1e-7:  # mergekit's bounds
            masked *= before / after
    return masked


def _masks_by_name(rates: Sequence[float], seed: int) -> Masks:
    return lambda name, tensors: [
        Dropout(key_of(seed + i, name), p, 1 - p).keep(0, t.numel(), t.device).view(t.shape) if p else None
        for i, (t, p) in enumerate(zip(tensors, rates, strict=True))
    ]


def _masks_in_turn(changes: Changes, rates: Sequence[float]) -> Masks:
    """From torch's generator, for every tensor in turn, those that nobody asks for too (a merge that goes
    on where another stopped)."""
    turn = iter(changes.entries.items())

    def masks(name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        for now, entry in turn:
            drawn = [torch.bernoulli(torch.full(entry.shape, 1 - p)).bool() if p else None for p in rates]
            if now == name:
                return drawn
        raise OptxError(f"DARE: {name!r} is asked for out of turn; give a seed of 0 or more.")

    return masks
