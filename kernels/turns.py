"""Processes that start together compile a module once: one does, and the others wait for what it keeps.

Eight processes of a `torchrun` would each spend the same seconds on each module, on cores that they share.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress

from optx._cache import kernel_folder

LONGEST = 60.0  # seconds; longer than anything takes to compile, as what is waited for may have been stopped


class _Turn:
    """The right to compile a module: taken at its first function that isn't kept, held to its end."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.taken = False
        self.held = ExitStack()


_now: list[_Turn] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_now.clear)  # those are the parent's


@contextmanager
def turn(module: str) -> Generator[None]:
    """While a generated module is run; what it compiles meanwhile is its own affair."""
    mine = _Turn(module)
    _now.append(mine)
    with mine.held:
        try:
            yield
        finally:
            with suppress(ValueError):
                _now.remove(mine)


def wait() -> bool:
    """Wait for a process that compiles the module which is being run; whether to look again for what it kept.

    Where there is no folder, or none with locks, each process compiles on its own.
    """
    if not _now or _now[-1].taken:
        return False
    mine = _now[-1]
    mine.taken = True
    with suppress(OSError):
        if mine.held.enter_context(kernel_folder().locked(f".{mine.module}.turn", LONGEST)):
            mine.held.close()  # all is kept by now; or nothing can be, and nobody has to wait for that
        return True
    return False
