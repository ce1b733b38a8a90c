"""Which tensors of a tuned model go with which of its base: tied ones, new heads, and what has no partner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from optx._errors import OptxError, near
from optx.delta._checkpoint_source import Source, check_alike
from optx.delta._refusals import check_not_quantised
from optx.delta._ties import is_copy, stands_for

_WHO = "Delta.between"


@dataclass(frozen=True)
class Pairs:
    """What a difference is of.

    Attributes:
        places: by the name in the base, the name in the tuned model.
        whole: names of floating tensors that are taken from the tuned model as they are.
        tied: names that the tuned model has no tensor of its own for, nor the base.
    """

    places: dict[str, str]
    whole: frozenset[str]
    tied: dict[str, str]


def pairs(old: Source, new: Source, keep: Callable[[str], bool], whole: Callable[[str], bool]) -> Pairs:
    """Pair two checkpoints' tensors.

    Args:
        old: the base.
        new: the tuned model.
        keep: which names count.
        whole: which are taken whole from the tuned model where they have no partner of their shape.

    Raises:
        OptxError: a tensor has no partner, or is quantised.
        ShapeError: a tensor has two shapes; names it.
    """
    check_not_quantised(_WHO, old.entries, "base", keep)
    check_not_quantised(_WHO, new.entries, "tuned", keep)
    places, taken = dict[str, str](), set[str]()
    for name, entry in new.entries.items():
        if not keep(name):
            continue
        partner = old.entries.get(name)
        if (
            whole(name)
            and entry.dtype.is_floating_point
            and (partner is None or partner.shape != entry.shape)
        ):
            places[name] = name
            taken.add(name)
        elif partner is not None:
            check_alike(_WHO, name, entry, "tuned", partner, "Leave it out")
            places[name] = name
        elif not is_copy(name, new, old, _WHO, "tuned"):
            raise OptxError(
                f"{_WHO}: tuned has {name!r}, which base lacks. {near(name, old.entries)} Leave it out with "
                "exclude=, or take it as it is with whole=."
            )
    for name, entry in old.entries.items():
        if not keep(name) or name in places:
            continue
        place = stands_for(name, new, old)
        if place is None:
            raise OptxError(
                f"{_WHO}: base has {name!r}, which tuned lacks. {near(name, new.entries)} Leave it out with "
                "exclude=."
            )
        check_alike(_WHO, name, new.entries[place], "tuned", entry, "Leave it out")
        places[name] = place
    tied = {name: first for name, first in new.tied.items() if name not in places}
    return Pairs(places, frozenset(taken), tied)


class Renamed(Source):
    """A source by other names."""

    def __init__(self, inner: Source, places: dict[str, str], tied: dict[str, str]) -> None:
        self._inner, self._places, self.tied = inner, places, tied
        self.entries = {name: inner.entries[place] for name, place in places.items()}

    @property
    def label(self) -> str:
        """The source's."""
        return self._inner.label

    @property
    def state(self) -> tuple[object, ...]:
        """The source's."""
        return self._inner.state

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._inner.read(self._places[name])

    def head(self, name: str, count: int) -> Tensor:
        """Its first numbers."""
        return self._inner.head(self._places[name], count)

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """Some of its numbers."""
        return self._inner.piece(self._places[name], begin, end)


def in_order(pairs: Pairs, new: Source) -> list[str]:
    """The names, in the order that the tuned model's file is cheap to read in."""
    at = {name: number for number, name in enumerate(new.entries)}
    return sorted(pairs.places, key=lambda name: at[pairs.places[name]])
