"""Runs a program's compiled CPU kernels over the tensors of one bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optx.kernels import cpu
from optx.kernels.step.cpu_text import Args
from optx.kernels.step.emit_cpu import compiled
from optx.kernels.step.layout import Columns, Layout, partials_per_chunk, split
from optx.kernels.step.program import Program
from optx.kernels.step.runner import Step

SERIAL = 32768  # below this many elements waking other threads costs more than it saves


class CpuStep(Step):
    """Tables and kernels for a fixed list of tensors; addresses and numbers may change at every step.

    Args:
        program: what to compute.
        layout: how the tensors are stored.
        numels: their sizes; 0 is fine.
        ids: a number per tensor that stays the same whichever others have a gradient, for random draws.
    """

    def __init__(self, program: Program, layout: Layout, numels: Sequence[int], ids: Sequence[int]) -> None:
        self.program = program
        self.columns = Columns.of(program, layout)
        self._module = compiled(program, layout)
        count = len(numels)
        self._chunks, self._first = split(numels)
        self._partials = np.zeros((max(len(self._chunks), 1), partials_per_chunk(program)))
        self.tensors = np.zeros((count, self.columns.row), dtype=np.int64)
        self.tensors[:, -1] = ids
        self.cols = np.zeros((count, len(self.columns.cols)))
        self.cols[:, self.columns.cols.index("numel")] = numels
        self.hypers = np.zeros(len(self.columns.hypers) + len(self.columns.totals))
        self.totals = np.zeros(max(len(self.columns.totals), 1))
        self._args = np.zeros(len(Args), dtype=np.int64)
        for position, table in (
            (Args.CHUNKS, self._chunks),
            (Args.TENSORS, self.tensors),
            (Args.COLS, self.cols),
            (Args.HYPERS, self.hypers),
            (Args.PARTIALS, self._partials),
            (Args.FIRST, self._first),
            (Args.TOTALS, self.totals),
        ):
            self._args[position] = table.ctypes.data
        self._address = int(self._args.ctypes.data)
        self._args[Args.STOP] = len(self._chunks)
        self._args[Args.SUM] = len(self._chunks) - 1
        self._args[Args.TENSOR_HIGH] = count
        self._parallel = sum(numels) > SERIAL
        contents = vars(self._module).items()
        self._kernels = {name: int(one.address) for name, one in contents if hasattr(one, "address")}

    def set_key(self, key: int) -> None:
        """The key of this step's random draws."""
        self._args[_KEY] = key

    def _each_tensor(self, kernel: str) -> None:
        address = self._kernels.get(kernel)
        if address is not None:
            cpu.run(address, self._address, parallel=False)

    def _each_chunk(self, kernel: str) -> None:
        self._args[_NEXT] = 0
        cpu.run(self._kernels[kernel], self._address, self._parallel)

    def measure(self, level: int) -> None:
        """Take a level's sums and scalars, and this bucket's share of its totals."""
        self.totals[:] = 0.0
        if self.program.levels[level].sums:
            self._each_chunk(f"reduce_{level}")
        self._each_tensor(f"scalars_{level}")

    def receive(self, totals: Mapping[str, float]) -> None:
        """Take totals over the whole optimizer, for `finish`."""
        for i, name in enumerate(self.columns.totals, start=len(self.columns.hypers)):
            if name in totals:
                self.hypers[i] = totals[name]

    def finish(self, level: int) -> None:
        """The scalars that waited for the totals, see `receive`."""
        self._each_tensor(f"finish_{level}")

    def update(self) -> None:
        """Rewrite weights and state.

        Goes from the last chunk to the first: what the pass before read last is still in cache.
        """
        self._each_chunk("update")

    def commit(self) -> None:
        """Make the step count and observed sums state."""
        self._each_tensor("commit")


_NEXT, _KEY = int(Args.NEXT), int(Args.KEY)
