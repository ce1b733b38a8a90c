"""A step's numbers of param groups, taken anew where one of the settings that they come from is another."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, cast

from optx.step.counting import ADVANCES, step_numbers
from optx.step.group_numbers import keys_of
from optx.step.transform import Group


class KnownNumbers:
    """The numbers of these names, by group, as floats.

    Args:
        names: as rules have them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._keys = list(dict.fromkeys(key for name in names for key in keys_of(name)))
        # By the group's id: its settings, and what they make, whichever group has them.
        self._known: dict[int, tuple[list[Any], list[float]]] = {}

    def of(self, group: Group) -> list[float]:
        """A group's numbers: the same list as before where nothing changed.

        Raises:
            OptxError: one of them is no number any more.
        """
        settings = [group.get(key, _ABSENT) for key in self._keys]
        known = self._known.get(id(group))
        if known is not None and all(map(is_, settings, known[0])):
            return known[1]
        row = list(map(float, step_numbers(group, self._names).values()))
        if ADVANCES not in self._names and all(map(_lasts, settings)):
            self._known[id(group)] = settings, row
        else:  # a tensor or a list may hold another number the next time
            self._known.pop(id(group), None)
        return row


_ABSENT = None, "absent"


def _lasts(value: Any) -> bool:
    """Whether a setting is what it is for as long as it is the same object."""
    several = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    return _PLAIN.issuperset(map(type, several))


_PLAIN = frozenset((float, int, bool, str, type(None)))
