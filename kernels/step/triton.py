"""Runs a program's Triton kernels over the tensors of one bucket."""
# Triton's kernels have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx.kernels.step.device_tiles import PAD, DeviceTiles
from optx.kernels.step.emit_triton import FOLD_LANES, compiled
from optx.kernels.step.layout import CHUNK, Columns, Geometry, Layout, partials_per_chunk, split
from optx.kernels.step.program import AXES, Axis, Program
from optx.kernels.step.runner import Step
from optx.kernels.step.stacks import Stacks
from optx.kernels.step.tiles import sizes_of
from optx.kernels.step.triton_tiles import line_width, stages
from optx.kernels.triton_lib import LAUNCH, fold_chunks

CHUNK_WARPS = 4
TENSOR_WARPS = 1
ENOUGH_CHUNKS = 1024  # programs that fill the largest devices
ALIGNMENT = 16  # bytes: the widest access


def compiler_options(program: Program, layout: Layout, kernel: str, nvidia: bool) -> dict[str, Any]:
    """How a kernel is compiled, besides its number of warps."""
    level = {f"reduce_{i}": i for i in range(len(program.levels))}.get(kernel)
    sums = () if level is None else program.levels[level].summed()
    options: dict[str, Any] = dict(LAUNCH)
    if nvidia and (kernel == "update" or len(sums) > 1) and layout.dtypes[0] != "float64":
        # Left alone, ptxas aims at 80 registers, and in a program of many roles, or one that takes several
        # sums, spills two of them. With 128, four blocks on a multiprocessor keep 64 KiB of AdamW's loads
        # in flight, where bandwidth times latency (0.8 us) asks for some 20, and 32 KiB of two roles that are
        # only summed. One that makes anew what three levels before it have made of gradients needs some more.
        options["maxnreg"] = 168 if level is not None and level > 2 else 128
    return options


def block_size(wave: int) -> int:
    """Elements per block: eight per thread, so that bfloat16 too moves 128 bits at a time.

    Args:
        wave: threads per warp: 32, or 64 on CDNA.
    """
    return 8 * CHUNK_WARPS * wave


def chunk_size(elements: int) -> int:
    """Elements per program: fewer in a small bucket, which would leave processors idle."""
    return max(4096, min(CHUNK, 1 << (elements // ENOUGH_CHUNKS).bit_length()))


class TritonStep(Step):
    """Tables and kernels for a fixed list of tensors; addresses and numbers may change at every step.

    Fill ``tensors``, ``cols`` and ``hypers`` as for `CpuStep`; what changed is copied to the device before
    the next kernel that reads it. A captured CUDA graph replays with what the device then holds: call
    `upload` before a replay to change numbers. Random draws go on under replay, see `set_key`.

    Args:
        program: what to compute.
        layout: how the tensors are stored.
        numels: their sizes; 0 is fine.
        ids: a number per tensor that stays the same whichever others have a gradient, for random draws.
        device: where the tensors are.
        wholes: where the tensors are shards, the sizes of what they are shards of; see `Step`.
        shapes: theirs, where the program asks for rows, columns, dimensions or whole matrices.
        chunk: elements per program of a chunk kernel, a multiple of ``block``.
        block: elements that a program handles at once.

    Attributes:
        totals: float64 on the device: this bucket's totals, set by `measure`.
        skip: int64 on the device; while it isn't 0, `update` and `commit` change nothing.
        uploads: how many tables have been copied to the device.
    """

    def __init__(
        self,
        program: Program,
        layout: Layout,
        numels: Sequence[int],
        ids: Sequence[int],
        device: torch.device | str,
        wholes: Sequence[int] | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
        *,
        chunk: int | None = None,
        block: int | None = None,
    ) -> None:
        self.program, self.device = program, torch.device(device)
        shapes = [(n,) for n in numels] if shapes is None else shapes
        self.stacks = Stacks(shapes, self.device)
        self.columns = c = Columns.of(program, layout)
        self._module = compiled(program, layout)
        self._block = block or block_size(64 if torch.version.hip else 32)
        chunk = chunk or chunk_size(sum(numels))
        self._tiles: DeviceTiles | None = None
        if program.tiled:
            room = layout.dtypes[0] == "float64", self.device, self._block, chunk, line_width(program)
            self._tiles = DeviceTiles(program, shapes, *room)
            self._chunks, first = self._tiles.table, self._tiles.first
        else:
            self._chunks, first = split(numels, chunk)
        nvidia = self.device.type == "cuda" and not torch.version.hip
        chunked = ["update", *(f"reduce_{i}" for i in range(len(program.levels)))]
        self._options = {name: compiler_options(program, layout, name, nvidia) for name in chunked}
        self.uploads = 0
        # int64 and float64 alike travel as int64.
        self._tensors = _Table((len(numels), c.row), self.device)
        self._cols = _Table((len(numels), len(c.cols)), self.device)
        self._hypers = _Table((1, len(c.hypers) + len(c.totals)), self.device)
        self._rows = _Table((len(self._chunks), self._chunks.shape[1] + 1), self.device)
        self._random = _Table((1, 2), self.device)  # key, and steps drawn since it was set
        self.tensors = self._tensors.host
        self.tensors[:, -1] = ids
        self.cols = self._cols.host.view(np.float64)
        self.cols[:, c.cols.index("numel")] = numels if wholes is None else wholes
        for name, values in sizes_of(shapes).items():
            if name in c.cols:
                self.cols[:, c.cols.index(name)] = values
        if self._tiles is not None:
            self.tensors[:, c.geometry : -1] = self._tiles.geometry
        self._stages = [stages(program, level) for level in range(len(program.levels))]
        self.hypers = self._hypers.host.view(np.float64)[0]
        self.totals = torch.zeros(max(len(c.totals), 1), dtype=torch.float64, device=self.device)
        self.skip = torch.zeros(1, dtype=torch.int64, device=self.device)
        # Numbers that live on the device (a tensor lr): by position in hypers, read anew in every step.
        self.live: Mapping[int, Tensor] = {}
        # Chunks on the device, and what their kernel is specialised on.
        self._spans: list[tuple[Tensor, dict[str, Any]]] = []
        width = partials_per_chunk(program)
        self._arguments = self._bind(first, width, len(numels))
        # Of shards: what kernels that go over tensors fold in the place of their chunks' sums.
        self._completed: dict[str, Tensor] = {}
        if wholes is not None:
            self.sums = torch.zeros((len(numels), width), dtype=torch.float64, device=self.device)
            single = torch.arange(len(numels) + 1, device=self.device)
            self._completed = {"partials": self.sums, "first": single}

    def _bind(self, first: npt.NDArray[np.int64], width: int, count: int) -> dict[str, Any]:
        """Device memory by the names that generated kernels give it."""
        partials = torch.zeros((max(len(self._chunks), 1), width), dtype=torch.float64, device=self.device)
        return {
            "tensors": self._tensors.device,
            "cols": self._cols.device.view(torch.float64),
            "hypers": self._hypers.device.view(torch.float64),
            "partials": partials,
            "first": torch.from_numpy(first).to(self.device),
            "totals": self.totals,
            "random": self._random.device,
            "skip": self.skip,
            "count": count,
            **({} if self._tiles is None else self._tiles.arguments),
        }

    # ---- tables ------------------------------------------------------------------------------------

    def set_key(self, key: int, drawn: int = 0) -> None:
        """The key of the random draws from this step on.

        Draws also depend on the number of the step: on the step count where the base keeps one, else on a
        count on the device (`drawn`). Both go on under replay, so one key can serve a whole run.

        Args:
            key: any integer of 64 bits. Setting the same key again changes nothing.
            drawn: for a base without step counts, the steps taken with this key before (on resuming).
        """
        self._random.host[0] = key, drawn

    @property
    def computed(self) -> Tensor:
        """After a step, a row of numbers for each tensor, on the device."""
        return self._arguments["cols"]

    @property
    def drawn(self) -> Tensor:
        """On the device: steps taken since the key was set, for bases without step counts."""
        return self._random.device[0, 1]

    def upload(self) -> None:
        """Bring the device's tables up to date, where the host's changed."""
        with self._on_device():
            if self._tensors.changed():
                self._order_chunks()
            for table in (self._tensors, self._cols, self._hypers, self._rows, self._random):
                self.uploads += table.upload()
            for i, number in self.live.items():
                self._arguments["hypers"][0, i : i + 1].copy_(number)

    def _order_chunks(self) -> None:
        """Chunks of aligned tensors first: those take 128-bit accesses, the others a kernel of their own.

        Tiles of one width go together.
        """
        addresses = self.tensors[:, : len(self.columns.roles)]
        aligned = (addresses % ALIGNMENT == 0).all(axis=1)
        widths = np.zeros(len(self._chunks), dtype=np.int64)
        if self._tiles is not None:
            aligned &= self._tiles.geometry[:, Geometry.WIDTH] % PAD == 0
            widths = self._tiles.widths
        kinds = 2 * widths + ~aligned[self._chunks[:, 0]]
        order = np.argsort(kinds, kind="stable")
        self._rows.host[:, :-1] = self._chunks[order]
        self._rows.host[:, -1] = order
        rows, self._spans, start = self._rows.device, [], 0
        for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True):
            options: dict[str, Any] = {"BLOCK": self._block, "ALIGNED": kind % 2 == 0}
            options |= {"WIDTH": int(kind // 2)} if self._tiles is not None else {}
            self._spans.append((rows[start : start + count], options))
            start += count

    def receive(self, totals: Mapping[str, Tensor | float]) -> None:
        """Take totals over the whole optimizer, on the device and without waiting for it, for `finish`."""
        self.upload()
        for i, name in enumerate(self.columns.totals, start=len(self.columns.hypers)):
            if name in totals:
                self._arguments["hypers"][0, i : i + 1].fill_(totals[name])

    # ---- kernels -----------------------------------------------------------------------------------

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _launch(self, name: str, programs: int, warps: int, **more: Any) -> None:
        kernel = vars(self._module).get(name)
        if kernel is None or programs == 0:
            return
        arguments = [more[n] if n in more else self._arguments[n] for n in kernel.arg_names]
        with self._on_device():
            kernel[(programs,)](*arguments, num_warps=warps, **self._options.get(name, LAUNCH))

    def _each_tensor(self, name: str) -> None:
        self._launch(name, len(self.tensors), TENSOR_WARPS, **self._completed)

    def _fold(self) -> None:
        """Of shards: each tensor's sums over its chunks."""
        if self.sums is not None:
            with self._on_device():
                options: dict[str, Any] = {"WIDTH": self.sums.shape[1], "LANES": FOLD_LANES}
                options |= {"num_warps": TENSOR_WARPS, **LAUNCH}
                chunked = self._arguments["partials"], self._arguments["first"]
                fold_chunks[(len(self.tensors),)](*chunked, self.sums, **options)

    def _each_chunk(self, name: str) -> None:
        for chunks, options in self._spans:
            self._launch(name, len(chunks), CHUNK_WARPS, chunks=chunks, **options)

    def _each_line(self, name: str, axis: Axis) -> None:
        self._launch(name, len(self._arguments[f"{axis}_lines"]), CHUNK_WARPS)

    def sum(self, level: int) -> None:
        """Take a level's sums."""
        self.upload()
        if self.program.levels[level].sums:
            self._each_chunk(f"reduce_{level}")
            self._fold()

    def store(self, kernel: str) -> None:
        """Run a kernel that stores what a function of whole matrices is given."""
        self.upload()
        self._each_chunk(kernel)

    def scalars(self, level: int) -> None:
        """Take the scalars that follow from them, and this bucket's share of its totals."""
        for stage in self._stages[level]:
            if stage.axis is None:
                self._each_tensor(stage.name)
            else:
                self._each_line(stage.name, stage.axis)
        self._launch(f"totals_{level}", 1, CHUNK_WARPS)

    def finish(self, level: int) -> None:
        """The scalars that waited for the totals, see `receive`."""
        self.upload()
        self._each_tensor(f"finish_{level}")

    def update(self) -> None:
        """Rewrite weights and state, unless ``skip`` is set."""
        self.upload()
        self._each_chunk("update")
        if self.program.left:
            self._fold()

    def commit(self) -> None:
        """Make the step count and observed sums state, unless ``skip`` is set."""
        self._each_tensor("commit")
        for axis in AXES if self._tiles is not None else ():
            self._each_line(f"commit_{axis}", axis)


class _Table:
    """int64 rows on the host, and their copy on the device."""

    RING = 4  # steps that the host may run ahead of the device while it changes numbers in each

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.host: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.device = torch.zeros(shape, dtype=torch.int64, device=device)
        self._sent = self.host.tobytes()  # zeros, as on the device
        self._cuda = device.type == "cuda"
        self._ring: list[tuple[Tensor, Any]] = []
        self._turn = 0

    def changed(self) -> bool:
        """Whether the host's rows differ from what was sent."""
        return self.host.tobytes() != self._sent

    def upload(self) -> bool:
        """Send the rows if they changed; True if they did.

        Copies are asynchronous, from a ring of pinned buffers: one is written again only after its last copy
        has happened.
        """
        if not self.changed():
            return False
        if self._cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "optx: an address or number changed while a CUDA graph was being captured, which would "
                "capture the copy of a buffer that is reused. Take one step before capture, keep "
                "gradients in place (zero_grad(set_to_none=False)) and change numbers between replays only."
            )
        self._sent = self.host.tobytes()
        buffer, copied = self._next_buffer()
        buffer.numpy()[...] = self.host
        self.device.copy_(buffer, non_blocking=self._cuda)
        if copied is not None:
            copied.record()
        return True

    def _next_buffer(self) -> tuple[Tensor, Any]:
        turn = self._turn
        self._turn = (turn + 1) % self.RING
        if turn == len(self._ring):
            buffer = torch.zeros(self.host.shape, dtype=torch.int64, pin_memory=self._cuda)
            self._ring.append((buffer, torch.cuda.Event() if self._cuda else None))
        elif self._cuda:
            self._ring[turn][1].synchronize()
        return self._ring[turn]
