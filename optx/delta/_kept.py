"""What a merging method keeps of one model's change, entry by entry: the largest, or some at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optx.delta._random_mask import Dropout

Mask = Callable[[int, Tensor], Tensor]
"""Which entries of a flat piece are kept, by the place where it begins."""


@dataclass(frozen=True)
class Trim:
    """The largest entries by magnitude.

    Attributes:
        size: the smallest magnitude that is kept.
        stop: entries that equal it are kept before this place only; None: everywhere.
    """

    size: float
    stop: int | None = None

    def keep(self, begin: int, change: Tensor) -> Tensor:
        """Which entries of a flat piece are kept."""
        size = change.abs().to(torch.float32)
        keep = size >= self.size
        if self.stop is not None and (first := max(self.stop - begin, 0)) < len(change):
            keep[first:] &= size[first:] != self.size
        return keep


@dataclass(frozen=True)
class Kept:
    """What is kept of one model's change of a tensor, and how it is rescaled.

    Attributes:
        by: what chooses; None keeps all.
        divisor: of what is kept.
        factor: of what is kept, after that.
    """

    by: Dropout | Trim | Mask | None = None
    divisor: float = 1.0
    factor: float = 1.0

    @property
    def mask(self) -> Mask | None:
        """Which entries are kept; None: all."""
        by = self.by
        if isinstance(by, Dropout):
            return lambda begin, change: by.keep(begin, change.numel(), change.device)
        return by.keep if isinstance(by, Trim) else by

    def chosen(self, change: Tensor, begin: int) -> Tensor:
        """What is kept of a flat piece, the rest 0; not rescaled."""
        if (mask := self.mask) is None:
            return change
        return torch.where(mask(begin, change).to(change.device), change, 0.0)

    def of(self, change: Tensor, begin: int) -> Tensor:
        """The same, rescaled."""
        kept = self.chosen(change, begin)
        kept = kept if self.divisor == 1 else kept / self.divisor
        return kept if self.factor == 1 else kept * self.factor
