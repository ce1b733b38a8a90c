"""Tells of a trainer that clips gradients by their norm before `optx.Clip` does so again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from optx._errors import warn
from optx.integrations._metrics import wrapped_in
from optx.transforms.clip import Clip

_told: weakref.WeakSet[Clip] = weakref.WeakSet()


def tell_clipped_twice(where: str, optimizers: Iterable[Any], name: str, limit: Any, off: str) -> None:
    """Warn once where both clip.

    Args:
        where: what the warning is of.
        optimizers: what the trainer has.
        name: of the trainer's own limit.
        limit: its value; 0 and None clip nothing.
        off: how it is turned off.
    """
    for wrapped in filter(None, map(wrapped_in, optimizers)):
        for one in () if not limit else wrapped.transforms:
            if isinstance(one, Clip) and one not in _told:
                _told.add(one)
                warn(
                    f"{where}: {name} is {limit} and the optimizer has {one!r}, so gradients are clipped "
                    f"twice, and Clip's norm is that of clipped ones. Set {off}, or leave Clip out."
                )
