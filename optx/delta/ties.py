"""TIES: trim small changes, elect a sign for each entry, and average those that have it.

Source: TIES-Merging, arXiv 2306.01708, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optx._errors import check_choice, check_range
from optx.delta._combine import total, weighted
from optx.delta._entrywise import Entrywise
from optx.delta._kept import Kept, Trim
from optx.delta._merge_method import ByPieces, Changes, Combine, MergeMethod, OfPiece
from optx.delta._options import (
    CONVENTIONS,
    SCOPES,
    Convention,
    PerModel,
    Scope,
    numbers,
    per_model,
)
from optx.delta._order_statistics import order_statistics


@dataclass(frozen=True)
class TIES(MergeMethod):
    """Merge only the largest changes of each model, and of those only where the models agree on the sign.

    base + lam * the mean, entry by entry, of the kept changes that have the sign of their sum.

    Args:
        density: share of the entries that each model keeps, 0 to 1; one number for each model, or for all.
        lam: scale of the merged change; the paper tunes 0.8 to 1.8.
        weights: of the models, in the election and in the mean. The paper has none.
        scope: ``"global"`` finds the largest changes of the whole model (two passes over the files), and
            ``"tensor"`` those of each tensor. None: the convention's.
        normalize: divide by the weights of the models that take part, entry by entry (the mean of TIES).
            False sums them.
        convention: ``"paper"``, the authors' code: scope global; int(density * n) + 1 entries are kept, and
            those equal to the smallest kept; where the models cancel out, the sign elected most often counts
            (one more pass). ``"mergekit"``: scope tensor; exactly max(1, int(density * n)) are kept, of
            equal ones the first; there, plus counts.

    Paper values:
        ``density=0.2, lam=1.0``: where there is no validation data (the defaults).
        ``density=0.2, lam=0.8`` to ``density=0.2, lam=2.5``: in steps of 0.1 on validation data, T5-large and
            (IA)³ on T0-3B (authors' README).

    Limits: How well it does depends on ``lam`` as much as on the election: see `optx.search`.

    Keywords: merging, sign election, trimming, sparse, interference.

    Evidence: ``optx run merge``; ``test_merge.py``, ``test_merge_peers.py``.

    Raises:
        OptxError: an option out of range; at merge, another number of weights than of models.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(4)}
        >>> models = [{"w": torch.tensor([4.0, 3.0, 0.1, 0.2])}, {"w": torch.tensor([2.0, -5.0, 0.2, 0.1])}]
        >>> optx.merge(base, models, optx.TIES(density=0.25))["w"]
        tensor([ 3., -5.,  0.,  0.])

    Source: arXiv 2306.01708, algorithm 1.
    """

    density: PerModel = 0.2
    lam: float = 1.0
    weights: PerModel = 1.0
    scope: Scope | None = None
    normalize: bool = True
    convention: Convention = "paper"

    def __post_init__(self) -> None:
        for density in numbers(self.density):
            check_range("TIES", "density", density, 0, 1)
        check_choice("TIES", "scope", self.scope, (*SCOPES, None))
        check_choice("TIES", "convention", self.convention, CONVENTIONS)

    @property
    def whole(self) -> bool:
        """Whether the largest changes are those of the whole model."""
        return (self.scope or ("global" if self.convention == "paper" else "tensor")) == "global"

    @property
    def passes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Two for the thresholds of a whole model, one for the sign of entries that cancel out."""
        return (2 if self.whole else 0) + (self.convention == "paper")

    def prepare(self, changes: Changes) -> Combine:
        """Find what each model keeps, and the sign elected most often."""
        weights = per_model("TIES", "weights", self.weights, changes.models)
        densities = per_model("TIES", "density", self.density, changes.models)
        shared = self.trims(changes, densities) if self.whole else None

        def trims(name: str) -> list[Trim]:
            return shared or self.trims(changes.only(name), densities)

        on_zero = self._usual_sign(changes, weights, trims) if self.convention == "paper" else 1

        def of(name: str) -> OfPiece:
            kept = [Kept(trim) for trim in trims(name)]
            return Entrywise(kept, weights, self.normalize, self.lam, on_zero)

        return ByPieces(of)

    def _usual_sign(
        self, changes: Changes, weights: Sequence[float], trims: Callable[[str], list[Trim]]
    ) -> int:
        """The sign that is elected most often."""
        votes, now = 0, list[Trim]()
        for name, begin, tensors in changes.pieces():
            if not begin:
                now = trims(name)
            vote = total(weighted(trimmed(tensors, now, begin), weights)).sign()
            votes += int(vote.sum(dtype=torch.float64))
        return -1 if votes < 0 else 1

    def trims(self, changes: Changes, densities: Sequence[float]) -> list[Trim]:
        """What each model keeps of these changes, as if they were all there is."""
        n = changes.numel
        kept = [self._kept(density, n) for density in densities]
        if not n or all(k in (0, n) for k in kept):
            return [Trim(0.0 if k else math.inf) for k in kept]
        # A row that needs no threshold asks for its smallest entry, which costs nothing more.
        ranks = [[n - k if k else 0] for k in kept]
        found = order_statistics(lambda: ([t.abs() for t in ts] for _, _, ts in changes.pieces()), ranks, n)
        trims = [Trim(size if k else math.inf) for k, [size] in zip(kept, found, strict=True)]
        return _exactly(changes, kept, trims) if self.convention == "mergekit" and not self.whole else trims

    def _kept(self, density: float, n: int) -> int:
        if density >= 1:
            return n
        if self.convention == "paper":
            return min(int(n * density) + 1, n)
        return max(1, int(density * n)) if density > 0 else 0


def trimmed(tensors: Sequence[Tensor], trims: Sequence[Trim], begin: int = 0) -> list[Tensor]:
    """The largest entries by magnitude of each model's flat piece, the others 0.

    Args:
        tensors: one per model.
        trims: likewise.
        begin: place of the piece's first entry.
    """
    return [Kept(trim).of(t, begin) for t, trim in zip(tensors, trims, strict=True)]


def _exactly(changes: Changes, kept: Sequence[int], trims: Sequence[Trim]) -> list[Trim]:
    """With the places from which on an entry that equals the threshold is one too many."""
    left = list(kept)  # how many of the entries that equal the threshold have a place
    equal = [0] * len(kept)
    for _, _, tensors in changes.pieces():
        for i, (tensor, trim) in enumerate(zip(tensors, trims, strict=True)):
            size = tensor.abs().to(torch.float32)
            left[i] -= int((size > trim.size).sum())
            equal[i] += int((size == trim.size).sum())
    found = list(trims)
    if left == equal:
        return found
    for _, begin, tensors in changes.pieces():
        for i, (tensor, trim) in enumerate(zip(tensors, trims, strict=True)):
            if left[i] < equal[i] and found[i].stop is None:
                places = (tensor.abs().to(torch.float32) == trim.size).nonzero().flatten()
                if len(places) > left[i]:
                    found[i] = replace(trim, stop=begin + int(places[left[i]]))
                left[i] -= len(places)
                equal[i] -= len(places)
    return found
