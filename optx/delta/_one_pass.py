"""What `optx.Delta.apply` makes in one pass: base, old and new numbers and a mask give the result at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from optx.delta._checkpoint_source import Source
from optx.delta._float32_sums import check_overflow, finite
from optx.delta._random_mask import NOTHING, Dropout


def _keeps_all(_name: str) -> Dropout:
    return NOTHING


@dataclass(frozen=True)
class OnePass:
    """A difference of two sources, at most pruned at random.

    Attributes:
        old: what it was taken from.
        new: the same, tuned.
        dropouts: the pruning, by name.
    """

    old: Source
    new: Source
    dropouts: Callable[[str], Dropout] = _keeps_all

    def onto(self, base: Source | None, name: str, begin: int, end: int) -> Tensor:
        """A flat piece of the base with its change; None: the base that the difference is of.

        Raises:
            OptxError: numbers became too large for the base's dtype.
        """
        old, new = self.old.piece(name, begin, end), self.new.piece(name, begin, end)
        mine = old if base is None else base.piece(name, begin, end)
        made = self.dropouts(name).onto(mine, old, new, begin)
        if not finite(made):
            check_overflow("Delta.apply", name, made, mine, new)
        return made

    def pruned(self, dropouts: Callable[[str], Dropout]) -> OnePass | None:
        """The same with dropouts; None if it has some, since two masks take more than one pass."""
        return replace(self, dropouts=dropouts) if self.dropouts is _keeps_all else None
