"""What the CPU and the Triton runner of a bucket have in common: the order of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optx.kernels.step.layout import Columns
from optx.kernels.step.program import Program
from optx.kernels.step.stacks import Stacks


class Step(ABC):
    """Runs a program over the tensors of one bucket.

    Before a step the caller fills the tables: addresses into ``tensors``, numbers into ``cols`` and
    ``hypers``, in the order of ``columns``.

    Of tensors that are shards of larger ones (``wholes`` was given) only the caller can complete the sums:
    after `sum`, and after `update` where something is observed, it adds to ``sums`` what others have.

    Attributes:
        totals: after `measure`, this bucket's share of each total.
        sums: of shards: a row per tensor, float64.
        axis_sums: of shards: sums over all rows and columns, float64, where the program takes some.
    """

    program: Program
    columns: Columns
    tensors: Any
    cols: Any
    hypers: Any
    totals: Any
    sums: Tensor | None = None
    axis_sums: Tensor | None = None
    stacks: Stacks

    @property
    @abstractmethod
    def computed(self) -> Any:
        """After a step, a row of float64 for each tensor, in the order of ``columns.cols``; the next one
        writes into it."""

    @abstractmethod
    def sum(self, level: int) -> None:
        """Take a level's sums."""

    @abstractmethod
    def scalars(self, level: int) -> None:
        """Take the scalars that follow from a level's sums, and this bucket's share of its totals."""

    @abstractmethod
    def store(self, kernel: str) -> None:
        """Run a kernel that stores what a function of whole matrices is given."""

    def fill(self, level: int) -> None:
        """Call a level's functions of whole matrices."""
        for number, one in enumerate(self.program.levels[level].fills):
            column = self.columns.roles.index(one.result.name)
            for members, addresses in self.stacks.open(one):
                self.tensors[members, column] = addresses
            self.store(f"fill_{level}_{number}")
            self.stacks.apply(one)

    def measure(self, level: int) -> None:
        """Take a level's sums and scalars, and this bucket's share of its totals."""
        self.fill(level)
        self.sum(level)
        self.scalars(level)

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
