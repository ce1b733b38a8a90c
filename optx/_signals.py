"""A stretch of Python that no signal interrupts: what arrives in it is handled at its end."""

from __future__ import annotations

import signal
import threading
from _signal import getsignal as current  # pyright: ignore[reportMissingImports]
from _signal import signal as handle  # pyright: ignore[reportMissingImports]
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

# (The module signal makes enums of everything, which takes ten times as long as the calls.)
# Those whose handlers are written in Python and may raise: Ctrl-C, a scheduler's warning, a timeout.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def uninterrupted() -> Generator[None]:
    """Hold Python's signal handlers off; they run, and may raise, when the block is done.

    A kernel is never interrupted, but the lines between two kernels may be. Only the main thread runs
    handlers, so elsewhere there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))

    handlers = {number: handler for number in _SIGNALS if callable(handler := current(number))}
    for number in handlers:
        handle(number, remember)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            handle(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)  # type: ignore[operator]
