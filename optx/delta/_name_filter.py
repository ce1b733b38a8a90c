"""Which tensors an operation is for: ``include`` and ``exclude``, regular expressions of whole names."""

from __future__ import annotations

import re
from collections.abc import Callable

from optx._errors import OptxError


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
