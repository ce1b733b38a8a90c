"""A stretch of Python that no signal interrupts: what arrives in it is handled at its end."""

from __future__ import annotations

import signal
import threading
from _signal import getsignal as current  # pyright: ignore[reportMissingImports]
from _signal import signal as handle  # pyright: ignore[reportMissingImports]
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# (The module signal makes enums of everything, which takes ten times as long as the calls.)
# Those whose handlers are written in Python and may raise: Ctrl-C, a scheduler's warning, a timeout.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Held:
    """Python's signal handlers, held off inside ``with``: what arrives meanwhile is handled at its end.

    A kernel is never interrupted, but the lines between two kernels may be.
    """

    def __init__(self) -> None:
        self._handlers: list[tuple[int, Any]] = []
        self._arrived: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Held:
        """From now on handlers wait. Only the main thread runs any, so elsewhere there is nothing to do."""
        if threading.get_ident() == threading.main_thread().ident:  # another one in a fork
            self._handlers = [(n, handler) for n in _SIGNALS if callable(handler := current(n))]
        for number, _ in self._handlers:
            handle(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))

    def __exit__(self, *_: object) -> None:
        """Handlers run again, first for what has arrived."""
        handlers, self._handlers = self._handlers, []
        for number, handler in handlers:
            handle(number, handler)
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            by_number = dict(handlers)
            for number, frame in arrived:
                by_number[number](number, frame)

    @contextmanager
    def let_through(self) -> Generator[None]:
        """Inside, signals interrupt again: for a person's code, which may take long."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
