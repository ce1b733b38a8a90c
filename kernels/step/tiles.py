"""Tiles of tensors as matrices, and the numbers per row and column that kernels leave and find beside them.

A tensor of two or more dimensions is a matrix of (shape[0], all the rest), so that a row is what makes one
output of a layer; one of fewer is a single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optx.kernels.step.layout import CHUNK, Geometry
from optx.kernels.step.program import Program

WIDEST = 8192  # columns of a tile
LOWEST = 32  # rows of a tile where columns are summed: each has as many float64 as columns


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor."""
    height = int(shape[0]) if len(shape) > 1 else 1
    return height, int(np.prod(shape[len(shape) > 1 :], dtype=np.int64))


def sizes_of(shapes: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """What rules may read of tensors' shapes, by name."""
    rows, columns = zip(*map(matrix, shapes), strict=True) if shapes else ((), ())
    found = {"ndim": map(len, shapes), "rows": rows, "columns": columns}
    return {name: list(map(float, values)) for name, values in found.items()}


@dataclass
class Tiles:
    """The tiles of some tensors, and room for what is computed per row and column.

    Args:
        program: says what that is.
        shapes: of the tensors.
        wide: whether numbers are float64, else float32.
        single: each is one tile, also where it has no elements.

    Attributes:
        table: int64 rows (tensor, first row, rows, first column, columns, block, address of its sums per
            column); tensor after tensor, row after row.
        first: each tensor's first tile, and one past the last.
        geometry: a row per tensor, see `Geometry`.
        starts: the same with places in arrays for addresses.
        adds: the place in ``left`` of each tile's sums per column.
        left: float64 sums of each row in each block, then those of the tiles' columns.
        rows: numbers per row, of each tensor in turn.
        columns: numbers per column.
        sums: float64 sums per column, of each tensor in turn.
    """

    ROW = 7

    def __init__(
        self, program: Program, shapes: Sequence[Sequence[int]], wide: bool, single: bool = False
    ) -> None:
        matrices = list(map(matrix, shapes))
        counts = {kind: max(len(v.summed(kind)) for v in program.levels) for kind in ("row", "column")}
        per_row, per_column = len(program.along("row")), len(program.along("column"))
        rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.geometry = np.zeros((len(shapes), len(Geometry)), dtype=np.int64)
        first, adds, parts, found_rows, found_columns, sums = [0], 0, 0, 0, 0, 0
        for t, (height, width) in enumerate(matrices):
            across = (width if single else min(width, WIDEST)) or 1
            down = height if single else max(CHUNK // across, LOWEST if counts["column"] else 1)
            blocks = 1 if single else -(-width // across)
            self.geometry[t] = height, width, blocks, found_rows, found_columns, parts, sums
            for row in [0] if single else range(0, height if width else 0, down):
                tall = min(down, height - row)
                for block in range(blocks):
                    n = min(across, width - block * across)
                    rows.append((t, row, tall, block * across, n, block, adds))
                    adds += counts["column"] * n
            first.append(len(rows))
            parts += counts["row"] * height * blocks
            sums += counts["column"] * width
            found_rows += per_row * height
            found_columns += per_column * width
        self.table = np.zeros((len(rows), self.ROW), dtype=np.int64)
        self.table[:] = rows or self.table
        self.first = np.array(first, dtype=np.int64)
        self.sums = np.zeros(sums)
        self.left = np.zeros(parts + adds)
        dtype = np.float64 if wide else np.float32
        self.rows, self.columns = np.zeros(found_rows, dtype), np.zeros(found_columns, dtype)
        self.starts: npt.NDArray[np.int64] = np.array(self.geometry)
        self.adds: npt.NDArray[np.int64] = parts + self.table[:, 6]
        self._take_addresses()

    def _take_addresses(self) -> None:
        self.table[:, 6] = _addresses(self.left, self.adds)
        for at, room in (
            (Geometry.ROWS, self.rows),
            (Geometry.COLUMNS, self.columns),
            (Geometry.PARTS, self.left),
            (Geometry.SUMS, self.sums),
        ):
            self.geometry[:, at] = _addresses(room, self.geometry[:, at])


def _addresses(room: npt.NDArray[np.generic], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return room.ctypes.data + starts * room.itemsize
