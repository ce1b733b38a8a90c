"""What the CPU and the Triton runner of a bucket have in common: the order of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from optx.kernels.step.layout import Columns
from optx.kernels.step.program import Program


class Step(ABC):
    """Runs a program over the tensors of one bucket.

    Before a step the caller fills the tables: addresses into ``tensors``, numbers into ``cols`` and
    ``hypers``, in the order of ``columns``.

    Attributes:
        totals: after `measure`, this bucket's share of each total.
    """

    program: Program
    columns: Columns
    tensors: Any
    cols: Any
    hypers: Any
    totals: Any

    @abstractmethod
    def measure(self, level: int) -> None:
        """Take a level's sums and scalars, and this bucket's share of its totals."""

    @abstractmethod
    def receive(self, totals: Mapping[str, Any]) -> None:
        """Take totals over the whole optimizer, for `finish`."""

    @abstractmethod
    def finish(self, level: int) -> None:
        """The scalars that waited for the totals, see `receive`."""

    @abstractmethod
    def update(self) -> None:
        """Rewrite weights and state."""

    @abstractmethod
    def commit(self) -> None:
        """Make the step count and observed sums state."""

    def step(self) -> None:
        """A whole step, where nothing waits for totals."""
        for level in range(len(self.program.levels)):
            self.measure(level)
        self.update()
        self.commit()
