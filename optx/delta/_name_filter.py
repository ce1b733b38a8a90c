"""Which tensors an operation is for: ``include`` and ``exclude``, regular expressions of whole names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from optx._errors import OptxError, near
from optx._safetensors import Entry


def chooser(
    include: str | None, exclude: str | None, name_of_first: str = "include", who: str = "Delta"
) -> Callable[[str], bool]:
    """Whether a whole name matches ``include`` and not ``exclude``.

    Raises:
        OptxError: one of them is no regular expression.
    """
    for option, pattern in ((name_of_first, include), ("exclude", exclude)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise OptxError(f"{who}: {option}={pattern!r} is not a regular expression ({error}).") from None
    return lambda name: (
        (include is None or re.fullmatch(include, name) is not None)
        and (exclude is None or re.fullmatch(exclude, name) is None)
    )


def floating(who: str, entries: Mapping[str, Entry], include: str | None, exclude: str | None) -> list[str]:
    """The names of weights: floating tensors of two dimensions or more, or whatever ``include`` matches.

    Raises:
        OptxError: there are none, or one of the patterns is no regular expression.
    """
    keep = chooser(include, exclude, who=who)
    known = {name: entry for name, entry in entries.items() if entry.dtype.is_floating_point}
    found = [name for name, entry in known.items() if keep(name) and (include or len(entry.shape) > 1)]
    if not found:
        asked = f"with include={include!r} and exclude={exclude!r} " if include or exclude else ""
        raise OptxError(
            f"{who}: there are no weights {asked}(floating tensors of two dimensions or more, or what "
            f"include= names). {near(include or '', known)}"
        )
    return found
