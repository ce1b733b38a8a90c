"""TIES: trim small changes, elect a sign for each entry, and average those that have it.

Source: TIES-Merging, arXiv 2306.01708, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optx._errors import check_range
from optx.delta._combine import PerModel, check_choice, elected, numbers, per_model, total, weighted
from optx.delta._select import order_statistics
from optx.delta.merge import Changes, Combine, MergeMethod

Trim = tuple[int, float]
"""How many entries are kept, and the smallest magnitude among them."""


@dataclass(frozen=True)
class TIES(MergeMethod):
    """Merge only the largest changes of each model, and of those only where the models agree on the sign.

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
    scope: Literal["global", "tensor"] | None = None
    normalize: bool = True
    convention: Literal["paper", "mergekit"] = "paper"

    def __post_init__(self) -> None:
        for density in numbers(self.density):
            check_range("TIES", "density", density, 0, 1)
        check_choice("TIES", "scope", self.scope, ("global", "tensor", None))
        check_choice("TIES", "convention", self.convention, ("paper", "mergekit"))

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
        trims = self._trims(changes, densities) if self.whole else None

        def trimmed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
            now = trims or self._trims(Changes.of(name, tensors), densities)
            exactly = self.convention == "mergekit" and not self.whole
            return [trim(t, kept, exactly) for t, kept in zip(tensors, now, strict=True)]

        on_zero = 1
        if self.convention == "paper":
            votes = (total(weighted(trimmed(n, ts), weights)).sign() for n, ts in changes)
            on_zero = -1 if sum(int(vote.sum(dtype=torch.float64)) for vote in votes) < 0 else 1

        def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
            kept = trimmed(name, tensors)
            return elected(kept, weights, self.normalize, self.lam, on_zero)

        return combine

    def _trims(self, changes: Changes, densities: Sequence[float]) -> list[Trim]:
        n = changes.numel
        kept = [self._kept(density, n) for density in densities]
        if not n or all(k in (0, n) for k in kept):
            return [(k, 0.0) for k in kept]
        # A row that needs no threshold asks for its smallest entry, which costs nothing more.
        ranks = [[n - k if k else 0] for k in kept]
        found = order_statistics(lambda: ([t.abs() for t in ts] for _, ts in changes), ranks, n)
        return [(k, threshold) for k, [threshold] in zip(kept, found, strict=True)]

    def _kept(self, density: float, n: int) -> int:
        if density >= 1:
            return n
        if self.convention == "paper":
            return min(int(n * density) + 1, n)
        return max(1, int(density * n)) if density > 0 else 0


def trim(change: Tensor, kept: Trim, exactly: bool = False) -> Tensor:
    """The largest entries by magnitude, the others 0.

    Args:
        change: any shape.
        kept: how many of the row, and the smallest magnitude among them.
        exactly: the change is the whole row, and of entries equal to the threshold only as many are kept as
            make the number up, the first ones.
    """
    count, threshold = kept
    if not count:
        return torch.zeros_like(change)
    size = change.abs().to(torch.float32)
    keep = size >= threshold
    if exactly and (over := int(keep.sum()) - count) > 0:
        last = (size == threshold).flatten().nonzero()[-over:]
        keep.view(-1)[last] = False
    return torch.where(keep, change, 0.0)
