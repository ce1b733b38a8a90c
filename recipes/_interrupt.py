"""Ctrl-C and SIGTERM as a wish to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ._report import console


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, so that a loop stops between two steps.

    A second one stops at once, as Python does. Use as a context manager and look at `wanted`.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self.__exit__()  # the next one is Python's own
        console.print("[yellow]Stopping after this step; again to stop at once.")
