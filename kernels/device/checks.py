"""A check, where it runs, and what comes of it."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class LeftOut(Exception):
    """A check that means nothing here, and why."""


class Wrong(Exception):
    """A result that is not what it must be."""


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        kind: what is looked at: ``correct``, ``speed``, ``registers``, ``launches``, ``graph``.
        what: on which kernels.
        run: gives the figures; raises `Wrong`, `LeftOut`, or whatever goes wrong.
    """

    kind: str
    what: str
    run: Callable[[Place], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Of no other check."""
        return f"{self.kind}: {self.what}"


@dataclass
class Row:
    """What came of a check; ``state`` is ``ok``, ``wrong``, ``error`` or ``left out``."""

    kind: str
    what: str
    state: str
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    said: str = ""
    seconds: float = 0.0


@dataclass
class Place:
    """Where checks run.

    Attributes:
        device: ``cuda`` (ROCm calls it so too), or ``cpu`` under Triton's interpreter.
        elements: of a bandwidth's tensors, all together.
        sizes: of tensors on which results are compared.
        repeats: of what is timed.
    """

    device: str
    elements: int
    sizes: tuple[int, ...]
    repeats: int

    @property
    def interpreted(self) -> bool:
        """Whether there is no GPU, and times mean nothing."""
        return self.device == "cpu"

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median time of a call on the device."""
        for _ in range(1 if self.interpreted else 3):
            run()
        return statistics.median(self._once(run) for _ in range(self.repeats))

    def _once(self, run: Callable[[], Any]) -> float:
        if self.interpreted:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes per second of a copy on the device, read and written: what all rates are held against."""
        count = max(4 * self.elements, 1024)  # as many bytes as a step of AdamW moves, about
        source, target = (torch.zeros(count, device=self.device) for _ in range(2))
        return 8 * count / self.seconds(lambda: target.copy_(source))

    def rate(self, moved: float, seconds: float) -> dict[str, float]:
        """Figures of bytes moved in a time; the interpreter's tell nothing."""
        rate = moved / seconds
        return {"GB/s": round(rate / 1e9, 1), "of a copy": round(rate / self.copy_rate, 3)}


def run(check: Check, place: Place) -> Row:
    """A row, whatever happens."""
    start = time.perf_counter()
    row = Row(check.kind, check.what, "ok")
    try:
        row.figures = dict(check.run(place))
        if not place.interpreted:
            torch.cuda.synchronize()  # what a kernel did wrong is told by the next call
    except LeftOut as reason:
        row.state, row.said = "left out", str(reason)
    except Wrong as reason:
        row.state, row.said = "wrong", str(reason)
    except Exception as error:
        row.state, row.said = "error", f"{type(error).__name__}: {error}".strip()[:2000]
    row.seconds = round(time.perf_counter() - start, 2)
    return row
