"""Numbers per row and column of tensors that lie here in part: what is summed of the parts goes together.

Of such a tensor every process has all rows' and columns' sums, and computes what follows from them of all:
what is kept of them is the same everywhere. Kernels that go over elements have tables of what lies here,
those that go over tensors of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from optx.kernels.step.layout import Geometry
from optx.kernels.step.program import AXES, Axis, Program
from optx.kernels.step.tiles import Tiles, matrix

Window = tuple[int, int, int, int]
"""What lies here of a tensor as a matrix: first row, first column, rows, columns."""

_Indices = npt.NDArray[np.int64]


class ShardTiles:
    """The tiles of what lies here, and of the whole tensors.

    Args:
        program: says what is computed per row and column.
        shapes: of the whole tensors.
        windows: what of each lies here.
        wide: whether numbers are float64, else float32.

    Attributes:
        here: tiles of what lies here.
        whole: one tile for each tensor.
        sums: float64: of all rows and columns, to be completed by what others have.
    """

    def __init__(
        self, program: Program, shapes: Sequence[Sequence[int]], windows: Sequence[Window], wide: bool
    ) -> None:
        self.here = Tiles(program, [window[2:] for window in windows], wide)
        self.whole = Tiles(program, shapes, wide, single=True)
        self.sums = self.whole.left
        matrices = list(map(matrix, shapes))
        self._windows = list(zip(windows, matrices, strict=True))
        self._of = np.zeros(len(self.here.left), dtype=np.int64)  # where each sum over a tile belongs
        for axis in AXES:
            count = max(len(level.summed(axis)) for level in program.levels)
            self._place(axis, count)
        self._found = {axis: self._read(axis, len(program.along(axis))) for axis in AXES}

    def _place(self, axis: Axis, count: int) -> None:
        """Where sums belong: of each row in each block, or of each tile's columns."""
        here, whole = self.here, self.whole
        if axis == "row":
            starts = zip(here.starts.tolist(), whole.starts[:, Geometry.PARTS].tolist(), strict=True)
            for (geometry, to), (window, (rows, _)) in zip(starts, self._windows, strict=True):
                own = _lines(count, rows, window[2], to + window[0])
                at = geometry[Geometry.PARTS]
                own = np.repeat(own, geometry[Geometry.BLOCKS])
                self._of[at : at + len(own)] = own
            return
        adds, to = here.adds.tolist(), whole.adds.tolist()
        for row, at in zip(here.table.tolist(), adds, strict=True):
            window, (_, columns) = self._windows[row[0]]
            own = _lines(count, columns, row[4], to[row[0]] + window[1] + row[3])
            self._of[at : at + len(own)] = own

    def _read(self, axis: Axis, count: int) -> _Indices:
        """Where numbers of rows or columns that lie here are among all."""
        field = Geometry.ROWS if axis == "row" else Geometry.COLUMNS
        side, found = axis == "column", [np.zeros(0, dtype=np.int64)]
        for to, (window, lengths) in zip(self.whole.starts[:, field].tolist(), self._windows, strict=True):
            found.append(_lines(count, lengths[side], window[2 + side], to + window[side]))
        return np.concatenate(found)

    def fold(self) -> None:
        """Put what was summed here where it belongs among all."""
        self.sums[:] = np.bincount(self._of, self.here.left, len(self.sums))

    def read(self) -> None:
        """Give kernels over elements the numbers of the rows and columns that lie here."""
        for axis, mine, every in (
            ("row", self.here.rows, self.whole.rows),
            ("column", self.here.columns, self.whole.columns),
        ):
            mine[:] = every[self._found[axis]]


def _lines(count: int, length: int, some: int, first: int) -> _Indices:
    """Of each of ``count`` arrays of a length, one after another: the places of some numbers."""
    starts = first + length * np.arange(count, dtype=np.int64)
    return np.ravel(starts[:, None] + np.arange(some, dtype=np.int64))
