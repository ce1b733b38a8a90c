"""Runs a program's compiled CPU kernels over the tensors of one bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.step.cpu_text import Args
from optx.kernels.step.emit_cpu import compiled
from optx.kernels.step.layout import Columns, Layout, partials_per_chunk, split
from optx.kernels.step.program import Program
from optx.kernels.step.runner import Step
from optx.kernels.step.shard_tiles import ShardTiles, Window
from optx.kernels.step.stacks import Stacks
from optx.kernels.step.tiles import Tiles, sizes_of

SERIAL = 32768  # below this many elements waking other threads costs more than it saves


class CpuStep(Step):
    """Tables and kernels for a fixed list of tensors; addresses and numbers may change at every step.

    Args:
        program: what to compute.
        layout: how the tensors are stored.
        numels: their sizes; 0 is fine.
        ids: a number per tensor that stays the same whichever others have a gradient, for random draws.
        owners: for each tensor, which of the param groups it is of; all are of the first by default.
        groups: how many there are.
        wholes: where the tensors are shards, the sizes of what they are shards of; see `Step`.
        shapes: theirs, where the program asks for rows, columns, dimensions or whole matrices.
        windows: where the tensors are shards, and the program sums rows or columns: what of each lies here.

    Attributes:
        groups: a row per param group: its hypers, the totals it was given, its own shares of the totals, and
            the key of its random draws (an integer). ``hypers`` and ``totals`` lie in the first.
        shares: after `measure`, each group's shares of the totals.
    """

    def __init__(
        self,
        program: Program,
        layout: Layout,
        numels: Sequence[int],
        ids: Sequence[int],
        owners: Sequence[int] = (),
        groups: int = 1,
        wholes: Sequence[int] | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
        windows: Sequence[Window] | None = None,
    ) -> None:
        self.program = program
        self.columns = Columns.of(program, layout)
        self._module = compiled(program, layout)
        count = len(numels)
        shapes = [(n,) for n in numels] if shapes is None else shapes
        self.stacks = Stacks(shapes, torch.device("cpu"))
        self._spread: ShardTiles | None = None
        if program.tiled:
            wide = layout.dtypes[0] == "float64"
            if windows is not None:
                self._spread = ShardTiles(program, shapes, windows, wide)
            self._tiles = Tiles(program, shapes, wide) if self._spread is None else self._spread.here
            self._chunks, self._first = self._tiles.table, self._tiles.first
        else:
            self._chunks, self._first = split(numels)
        self._partials = np.zeros((max(len(self._chunks), 1), partials_per_chunk(program)))
        self.tensors = np.zeros((count, self.columns.row), dtype=np.int64)
        self.tensors[:, -1] = ids
        self.cols = np.zeros((count, len(self.columns.cols)))
        self.cols[:, self.columns.cols.index("numel")] = numels if wholes is None else wholes
        c = self.columns
        for name, values in sizes_of(shapes).items():
            if name in c.cols:
                self.cols[:, c.cols.index(name)] = values
        if program.tiled:
            self.tensors[:, c.geometry : -1] = self._tiles.geometry
        self.groups = np.zeros((groups, c.group))
        self.hypers = self.groups[0, : c.shares]
        self.shares = self.groups[:, c.shares : c.key]
        self.totals = self.shares[0]
        self._keys = self.groups.view(np.int64)[:, c.key]
        # Where each tensor's group has its numbers.
        self._numbers = np.full(count, self.groups.ctypes.data)
        self._numbers[: len(owners)] += np.array(owners, np.int64) * self.groups.strides[0]
        self._args = np.zeros(len(Args), dtype=np.int64)
        for position, table in (
            (Args.CHUNKS, self._chunks),
            (Args.TENSORS, self.tensors),
            (Args.COLS, self.cols),
            (Args.NUMBERS, self._numbers),
            (Args.PARTIALS, self._partials),
            (Args.FIRST, self._first),
        ):
            self._args[position] = table.ctypes.data
        self._address = self._per_tensor = int(self._args.ctypes.data)
        self._args[Args.STOP] = len(self._chunks)
        self._args[Args.SUM] = len(self._chunks) - 1
        self._args[Args.TENSOR_HIGH] = count
        if wholes is not None:
            self._take_apart()
        self._parallel = sum(numels) > SERIAL
        contents = vars(self._module).items()
        self._kernels = {name: int(one.address) for name, one in contents if hasattr(one, "address")}
        self._in_one_go = [] if program.scratch or wholes is not None else list(self._calls())

    def _take_apart(self) -> None:
        """Have the kernels that go over tensors read sums that were completed meanwhile.

        They fold each tensor's chunks, so they are told that it has one.
        """
        count = len(self.tensors)
        self._sums = np.zeros((count, self._partials.shape[1]))
        self.sums = torch.from_numpy(self._sums)  # pyright: ignore[reportUnknownMemberType]
        self._filled = np.flatnonzero(np.diff(self._first))  # a process may have nothing of a tensor
        self._starts = self._first[self._filled]
        self._single = np.arange(count + 1)
        self._tensor_args: npt.NDArray[np.int64] = np.array(self._args)
        self._tensor_args[Args.PARTIALS] = self._sums.ctypes.data
        self._tensor_args[Args.FIRST] = self._single.ctypes.data
        if self._spread is not None:
            self.axis_sums = torch.from_numpy(self._spread.sums)  # pyright: ignore[reportUnknownMemberType]
            self._wholes = self.tensors.copy()
            self._wholes[:, self.columns.geometry : -1] = self._spread.whole.geometry
            self._tensor_args[Args.TENSORS] = self._wholes.ctypes.data
            self._tensor_args[Args.CHUNKS] = self._spread.whole.table.ctypes.data
        self._per_tensor = int(self._tensor_args.ctypes.data)

    def _fold(self) -> None:
        """Of shards: each tensor's sums over its chunks."""
        if self.sums is not None:
            self._sums[:] = 0.0
            if len(self._starts):
                self._sums[self._filled] = np.add.reduceat(self._partials, self._starts)
        if self._spread is not None:
            self._spread.fold()

    @property
    def computed(self) -> Tensor:
        """After a step, a row of numbers for each tensor."""
        return torch.from_numpy(self.cols)  # pyright: ignore[reportUnknownMemberType]

    def set_key(self, key: int | Sequence[int]) -> None:
        """The key of this step's random draws, for all groups or for each."""
        self._keys[:] = key

    def _each_tensor(self, kernel: str) -> None:
        address = self._kernels.get(kernel)
        if address is not None:
            if self._spread is not None:
                self._wholes[:, : self.columns.geometry] = self.tensors[:, : self.columns.geometry]
            cpu.run(address, self._per_tensor, parallel=False)

    def _each_chunk(self, kernel: str) -> None:
        self._args[_NEXT] = 0
        cpu.run(self._kernels[kernel], self._address, self._parallel)

    def _calls(self) -> Iterator[tuple[int, bool]]:
        """The kernels of a step in which nothing waits, and whether all threads run them."""
        for number, level in enumerate(self.program.levels):
            if level.sums:
                yield self._kernels[f"reduce_{number}"], self._parallel
            if scalars := self._kernels.get(f"scalars_{number}"):
                yield scalars, False
        yield self._kernels["update"], self._parallel
        if commit := self._kernels.get("commit"):
            yield commit, False

    def step(self) -> None:
        """A whole step, where nothing waits for totals."""
        if not self._in_one_go:
            super().step()
            return
        self.shares[:] = 0.0
        for kernel, parallel in self._in_one_go:
            self._args[_NEXT] = 0
            cpu.run(kernel, self._address, parallel)

    def sum(self, level: int) -> None:
        """Take a level's sums."""
        if self.program.levels[level].sums:
            self._each_chunk(f"reduce_{level}")
            self._fold()

    def store(self, kernel: str) -> None:
        """Run a kernel that stores what a function of whole matrices is given."""
        self._each_chunk(kernel)

    def scalars(self, level: int) -> None:
        """Take the scalars that follow from them, and each group's share of its totals."""
        self.shares[:] = 0.0
        self._each_tensor(f"scalars_{level}")
        if self._spread is not None:
            self._spread.read()

    def receive(self, totals: Mapping[str, float]) -> None:
        """Take totals over the whole optimizer, for `finish`."""
        for i, name in enumerate(self.columns.totals, start=len(self.columns.hypers)):
            if name in totals:
                self.groups[:, i] = float(totals[name])  # of one that is a tensor of a subclass too

    def finish(self, level: int) -> None:
        """The scalars that waited for the totals, see `receive`."""
        self._each_tensor(f"finish_{level}")

    def update(self) -> None:
        """Rewrite weights and state.

        Goes from the last chunk to the first: what the pass before read last is still in cache.
        """
        self._each_chunk("update")
        if self.program.left:
            self._fold()

    def commit(self) -> None:
        """Make the step count and observed sums state."""
        self._each_tensor("commit")


_NEXT = int(Args.NEXT)
