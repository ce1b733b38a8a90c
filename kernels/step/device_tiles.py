"""Tiles of tensors as matrices for Triton's kernels, and their room on the device.

As `optx.kernels.step.tiles` has it for the CPU's, but a tile is as wide as a block, so that a program walks
straight down, and what is summed over columns lies tile below tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx.kernels.step.layout import Geometry
from optx.kernels.step.program import AXES, Program
from optx.kernels.step.tiles import matrix

LINES = 32  # rows or columns that a program adds up
LANES = 32  # of each, partial sums at a time
LINE_ROW = 3  # int64: tensor, first row or column, partial sums of each
PAD = 16  # numbers: what begins at a multiple can be loaded 128 bits at a time


class Tile(IntEnum):
    """Positions in a tile's row, of int64."""

    TENSOR = 0
    TOP = 1  # first row
    TALL = 2  # rows
    COLUMN = 3  # first column
    BLOCK = 4  # which of the tiles side by side
    DOWN = 5  # which of those one below the other
    DOWNS = 6  # how many these are
    ORDER = 7  # position among the tensors' partials


class DeviceTiles:
    """The tiles of some tensors, and room for what is computed per row and column.

    Args:
        program: says what that is.
        shapes: of the tensors.
        wide: whether numbers are float64, else float32.
        device: where the tensors are.
        block: elements that a program handles at once.
        chunk: elements of a tile, about.
        line_width: numbers of a tensor that a stage over rows or columns sums.

    Attributes:
        table: int64 rows, see `Tile`; tensor after tensor.
        first: each tensor's first tile, and one past the last.
        widths: columns that a tile's program handles at once.
        geometry: a row per tensor, see `Geometry`.
        arguments: device memory by the names that generated kernels give it.
    """

    def __init__(
        self,
        program: Program,
        shapes: Sequence[Sequence[int]],
        wide: bool,
        device: torch.device,
        block: int,
        chunk: int,
        line_width: int,
    ) -> None:
        matrices = list(map(matrix, shapes))
        counts = [max(len(level.summed(axis)) for level in program.levels) for axis in AXES]
        named = [len(program.along(axis)) for axis in AXES]
        rows: list[tuple[int, ...]] = []
        widths: list[int] = []
        lines: dict[str, list[tuple[int, int, int]]] = {axis: [] for axis in AXES}
        firsts: dict[str, list[int]] = {axis: [0] for axis in AXES}
        self.geometry = np.zeros((len(shapes), len(Geometry)), dtype=np.int64)
        first, ends = [0], np.zeros(4, dtype=np.int64)
        for t, (height, width) in enumerate(matrices):
            wide_as = _across(height, width, block)
            down = max(chunk, block) // wide_as
            blocks, downs = (-(-width // wide_as), -(-height // down)) if height * width else (0, 0)
            self.geometry[t] = height, width, blocks, *ends
            for d, b in itertools.product(range(downs), range(blocks)):
                rows.append((t, d * down, min(down, height - d * down), b * wide_as, b, d, downs))
            widths += [wide_as] * (len(rows) - len(widths))
            first.append(len(rows))
            for axis, length, parts in (("row", height, blocks), ("column", width, downs)):
                lines[axis] += [(t, start, parts) for start in range(0, length, LINES)]
                firsts[axis].append(len(lines[axis]))
            room = named[0] * height, named[1] * width, counts[0] * height * blocks, counts[1] * width * downs
            ends += -(-np.array(room, dtype=np.int64) // PAD) * PAD
        self.table = np.zeros((len(rows), len(Tile) - 1), dtype=np.int64)
        self.table[:] = rows or self.table
        self.first, self.widths = np.array(first, dtype=np.int64), np.array(widths, dtype=np.int64)
        self.arguments: dict[str, Tensor] = {}
        for axis in AXES:
            table = torch.tensor(lines[axis], dtype=torch.int64, device=device)
            self.arguments[f"{axis}_lines"] = table.view(-1, LINE_ROW)
            self.arguments[f"{axis}_first"] = torch.tensor(firsts[axis], device=device)
        most = max(1, *(len(lines[axis]) for axis in AXES))
        self.arguments["line_partials"] = torch.zeros((most, line_width), dtype=torch.float64, device=device)
        self._make_room(ends, torch.float64 if wide else torch.float32, device)

    def _make_room(self, sizes: npt.NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> None:
        dtypes = (dtype, dtype, torch.float64, torch.float64)
        fields = (Geometry.ROWS, Geometry.COLUMNS, Geometry.PARTS, Geometry.SUMS)
        self._room: list[Tensor] = []
        for field, size, kind in zip(fields, sizes.tolist(), dtypes, strict=True):
            room = torch.zeros(max(size, 1), dtype=kind, device=device)
            self.geometry[:, field] = room.data_ptr() + self.geometry[:, field] * room.itemsize
            self._room.append(room)


def across(block: int) -> int:
    """Columns of a block of a matrix with many of both: as many as one warp loads of float32 at once."""
    return block // 8


def _across(height: int, width: int, block: int) -> int:
    """Columns of a block: the fewest that do, so that a warp has rows of its own."""
    few = height < 4 and width > across(block)
    narrow = (n for n in (block // 64, block // 16) if width <= n)
    return next(narrow, block if few else across(block)) or 1
