"""How the tensors of one bucket are stored and numbered: shared by the CPU and the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from optx.kernels.step.program import Program

CHUNK = 65536  # elements; five float32 streams of one chunk fit a second-level cache

GROUP = 32  # elements of a moment of 8 bits that share a scale
EIGHT = ("signed8", "nonnegative8")  # what a layout calls such moments
SPLIT = {"split8": "int8", "split16": "int16"}  # by rounding: what a weight's rest is kept in

# Positions of two cols in every table.
STEP = 1  # the number of the step; kernels fill it in where the layout is counted
FRESH = 2  # 1 in a tensor's first step


class Geometry(IntEnum):
    """What a tensor's row has of it as a matrix, in programs with sums over rows or columns."""

    HEIGHT = 0
    WIDTH = 1
    BLOCKS = 2  # of columns: its tiles side by side
    ROWS = 3  # address of the rows' numbers, one after another
    COLUMNS = 4  # of the columns'
    PARTS = 5  # of float64 sums per row and block
    SUMS = 6  # of float64 sums per column


@dataclass(frozen=True)
class Layout:
    """How one bucket of tensors is stored: what a kernel must be specialised on besides its program.

    Args:
        dtypes: dtype of each role: w, g, then the program's slots in order; ``signed8`` or ``nonnegative8``
            for moments of 8 bits.
        rounding: ``stochastic``, ``kahan``, ``nearest``, or how what is lost is kept (``split8``,
            ``split16``), for bfloat16 weights.
        counted: whether the base keeps a float32 step count per tensor.
    """

    dtypes: tuple[str, ...]
    rounding: str
    counted: bool

    def beside(self, slots: Sequence[str]) -> dict[str, str]:
        """Roles that come with others, and their dtypes: what goes with a weight, scales of moments."""
        found = {"kahan": "bfloat16"} if self.rounding == "kahan" else {}
        if self.rounding in SPLIT:
            found["rest"] = SPLIT[self.rounding]
        eight = [n for n, dtype in zip(slots, self.dtypes[2:], strict=True) if dtype in EIGHT]
        return found | {scale_of(name): "bfloat16" for name in eight}


def scale_of(slot: str) -> str:
    """The role that has a slot's scales."""
    return f"{slot}.scale"


@dataclass(frozen=True)
class Columns:
    """Where each number of a program is found in the rows of the tables."""

    roles: tuple[str, ...]
    cells: tuple[str, ...]
    cols: tuple[str, ...]
    hypers: tuple[str, ...]
    totals: tuple[str, ...]
    tiled: int = 0  # numbers of its geometry in a tensor's row

    @classmethod
    def of(cls, program: Program, layout: Layout) -> Columns:
        """Number everything."""
        roles = ("w", "g", *program.slots, *layout.beside(program.slots))
        vectors = (name for name, _ in program.vectors)
        cells = (*program.cells, *vectors, *(("step",) if layout.counted else ()))
        cols = dict.fromkeys(("numel", "step", "fresh", *program.named("col")))
        tiled = len(Geometry) if program.tiled else 0
        return cls(roles, cells, tuple(cols), program.named("hyper"), program.named("total"), tiled)

    @property
    def geometry(self) -> int:
        """In a row of the tensor table: where what `Geometry` names begins."""
        return len(self.roles) + len(self.cells)

    @property
    def row(self) -> int:
        """Width of a row of the tensor table: an address per role and cell, and the tensor's number."""
        return self.geometry + self.tiled + 1

    @property
    def shares(self) -> int:
        """In a group's row of numbers: where its shares of the totals begin, after those it was given."""
        return len(self.hypers) + len(self.totals)

    @property
    def key(self) -> int:
        """Where the key of its random draws is, an int64 among float64."""
        return self.shares + len(self.totals)

    @property
    def group(self) -> int:
        """Width of such a row."""
        return self.key + 1


def partials_per_chunk(program: Program) -> int:
    """How many sums the widest pass of a program takes."""
    counts = [len(level.summed()) for level in program.levels]
    return max([1, *counts, sum(len(c.writes) for c in (*program.observe, *program.meter))])


def split(numels: Sequence[int], chunk: int = CHUNK) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Chunks as rows (tensor, first element, count); each tensor's first chunk, and one past the last."""
    rows: list[tuple[int, int, int]] = []
    first = [0]
    for t, numel in enumerate(numels):
        rows += [(t, start, min(chunk, numel - start)) for start in range(0, numel, chunk)]
        first.append(len(rows))
    table = np.zeros((len(rows), 3), dtype=np.int64)
    table[:] = rows or table
    return table, np.array(first, dtype=np.int64)
