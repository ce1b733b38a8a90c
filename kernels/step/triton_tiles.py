"""Lines of generated Triton kernels that sum over rows and columns, and compute per row and per column.

A chunk of such a program is a tile of the weight as a matrix (`optx.kernels.step.device_tiles`): as many
columns as a block is wide, which a program walks down. A number per column stays in registers, one per row
comes with the rows. Each turn leaves its rows' sums over these columns, each tile its columns' over these
rows; kernels over stretches of rows or columns add them up in order, and run the rules per row or column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optx.kernels.step.device_tiles import LANES, LINE_ROW, LINES, Tile
from optx.kernels.step.layout import Geometry
from optx.kernels.step.program import AXES, Axis, Call, Program, Ref, in_turn
from optx.kernels.step.text import indent, variable
from optx.kernels.step.triton_lines import POINTERS, Pass, TritonLines, number_refs, stream
from optx.kernels.step.triton_text import JIT

LINE_PARTIALS = "line_partials"  # what stages over rows or columns sum to numbers of the tensor


@dataclass(frozen=True)
class Stage:
    """What one launch computes of a level's scalars.

    Attributes:
        name: of the kernel.
        axis: what it runs over; None for once per tensor.
        calls: the rules.
        sums: what it folds first.
        of: who left the partials of these; None: the level's pass over elements.
    """

    name: str
    axis: Axis | None
    calls: tuple[Call, ...]
    sums: tuple[Ref, ...] = ()
    of: Axis | None = None


def stages(program: Program, number: int) -> list[Stage]:
    """A level's, in order."""
    name, level = f"scalars_{number}", program.levels[number]
    if not program.tiled:
        return [Stage(name, None, level.scalars, tuple(r for c in level.sums for r in c.writes))]
    groups: list[tuple[Axis | None, list[Call]]] = in_turn(level.scalars)
    if not groups or groups[0][0] is not None:
        groups.insert(0, (None, []))
    known = {axis for axis, _ in groups}
    for axis in AXES:
        if axis not in known and level.summed(axis):
            groups.append((axis, []))
    found: list[Stage] = []
    for stage in _staged(groups, {axis: tuple(level.summed(axis or "col")) for axis in (None, *AXES)}):
        found.append(Stage(f"{name}_{len(found)}" if found else name, *stage))
    return found


def _staged(
    groups: Sequence[tuple[Axis | None, list[Call]]], sums: dict[Axis | None, tuple[Ref, ...]]
) -> Iterator[tuple[Axis | None, tuple[Call, ...], tuple[Ref, ...], Axis | None]]:
    """What follows each stage over rows or columns that sums something is one per tensor, which folds it."""
    left: tuple[Ref, ...] = ()
    of: Axis | None = None
    for axis, calls in groups:
        if left and axis is not None:
            yield None, (), left, of
            left = ()
        # The first of its kind folds what the pass over elements left.
        yield axis, tuple(calls), left or sums.pop(axis, ()), of if left else None
        left, of = (line_totals(calls), axis) if axis is not None else ((), None)
    if left:
        yield None, (), left, of


def line_totals(calls: Sequence[Call]) -> tuple[Ref, ...]:
    """What calls per row or column sum to numbers of the tensor."""
    return tuple(ref for call in calls for ref in call.writes if ref.kind == "col")


def line_width(program: Program) -> int:
    """How many such numbers a stage has at most; 1 at least."""
    every = (stage for i in range(len(program.levels)) for stage in stages(program, i))
    return max([1, *(len(line_totals(stage.calls)) for stage in every if stage.axis)])


class TritonTiles(TritonLines):
    """Of Triton's."""

    @property
    def _float(self) -> str:
        return "tl.float64" if self.wide else "tl.float32"

    def _field(self, at: Geometry) -> str:
        return f"tl.load(tensor + {self.table.geometry + at})"

    def _room(self, at: Geometry, dtype: str) -> str:
        return f"{self._field(at)}.to(tl.pointer_type({dtype}))"

    def _index(self, ref: Ref) -> int:
        return self.program.named(ref.kind).index(ref.name)

    # ---- over elements -------------------------------------------------------------------------------

    def _tile_kernel(self, one: Pass) -> list[str]:
        """``<name>_block`` for one block of elements, and the kernel that walks down a tile with it."""
        streams, numbers, sums = self._streams(one.roles), self._numbers(one), one.sums
        along = {axis: sorted({r for c in one.calls for r in c.args if r.kind == axis}) for axis in AXES}
        passed = [*numbers, *(variable(r) for axis in AXES for r in along[axis])]
        lines = self._block(one, [*map(stream, streams), *passed])
        partials = any(ref.kind not in AXES for ref in sums)
        lines += self._head(one, partials, "WIDTH: tl.constexpr")
        setup = [*_open_tile(skip=one.name == "update"), f"tensor = tensors + t * {self.table.row}"]
        setup += [f"height, width = {self._field(Geometry.HEIGHT)}, {self._field(Geometry.WIDTH)}"]
        setup += ["if ALIGNED:", "    width = tl.multiple_of(width, 16)"]
        setup += [f"{stream(role)} = {self._address(role, '0')}" for role in streams]
        setup += self._read_numbers(numbers)
        setup += ["lane = tl.arange(0, WIDTH)[None, :]", "inside = column + lane < width"]
        setup += self._beside(along["row"], along["column"])
        setup += self._left(sums)
        setup += ["line = tl.arange(0, BLOCK // WIDTH)[:, None]"]
        setup += ["for at in range(0, tall, BLOCK // WIDTH):"]
        setup += indent(self._turn(one, streams, passed, along["row"]), 1)
        return [*lines, *indent([*setup, *self._tile_sums(sums)], 1)]

    def _beside(self, rows: Sequence[Ref], columns: Sequence[Ref]) -> list[str]:
        """Where rows' numbers are; the columns' themselves."""
        lines = [f"rows_p = {self._room(Geometry.ROWS, self._float)}"] if rows else []
        if columns:
            lines += [f"columns_p = {self._room(Geometry.COLUMNS, self._float)}"]
            lines += ["if ALIGNED:", "    columns_p = tl.multiple_of(columns_p, 16)"]
        for ref in columns:
            at = f"columns_p + ({self._index(ref)} * width + column) + lane"
            lines.append(f"{variable(ref)} = tl.load({at}, inside, other=0.0)")
        return lines

    def _left(self, sums: Sequence[Ref]) -> list[str]:
        """Where sums go."""
        lines: list[str] = []
        if any(ref.kind == "row" for ref in sums):
            lines.append(f"parts_p = {self._room(Geometry.PARTS, 'tl.float64')}")
            lines.append(f"blocks = {self._field(Geometry.BLOCKS)}")
        zeros = "tl.zeros((BLOCK // WIDTH, WIDTH), tl.float64)"
        return [*lines, *(f"sum_{variable(r)} = {zeros}" for r in sums if r.kind != "row")]

    def _turn(
        self, one: Pass, streams: Sequence[str], passed: Sequence[str], rows: Sequence[Ref]
    ) -> list[str]:
        """A block of some rows."""
        lines = ["below = at + line < tall", "mask = below & inside"]
        lines.append("start = (top + at + line) * width + column")
        for ref in rows:
            at = f"rows_p + {self._index(ref)} * height + top + at + line"
            lines.append(f"{variable(ref)} = tl.load({at}, below, other=0.0)")
        place = "lane"
        if one.random:  # draws are made for eight elements from a multiple of eight on
            place = "place"
            lines += ["if ALIGNED:", "    place = lane", "else:", "    element = start + lane"]
            lines += ["    start = element // 8 * 8", "    place = (element % 8).to(tl.int32)"]
        pointers = [f"{stream(s)} + {self._on(s, 'start')}" for s in streams]
        start = ["start"] if one.random else []
        lines.append(self._call_block(one, [*pointers, *passed, *start, place, "mask"]))
        lines += [f"sum_{variable(r)} += x_{variable(r)}" for r in one.sums if r.kind != "row"]
        for i, ref in enumerate(r for r in one.sums if r.kind == "row"):
            at = f"parts_p + ({i} * height + top + at + line) * blocks + block"
            lines.append(f"tl.store({at}, tl.sum(x_{variable(ref)}, 1, keep_dims=True), below)")
        return lines

    def _tile_sums(self, sums: Sequence[Ref]) -> list[str]:
        """Keeps what a tile has summed over the tensor, and over columns."""
        lines: list[str] = []
        columns = [ref for ref in sums if ref.kind == "column"]
        if columns:
            lines.append(f"sums_p = {self._room(Geometry.SUMS, 'tl.float64')}")
        for i, ref in enumerate(columns):
            at = f"sums_p + ({i} * downs + down) * width + column + lane"
            lines.append(f"tl.store({at}, tl.sum(sum_{variable(ref)}, 0, keep_dims=True), inside)")
        totals = [ref for ref in sums if ref.kind not in AXES]
        if totals:
            lines.append(f"partial = partials + tl.load(row + {Tile.ORDER:d}) * {self.width}")
        for i, ref in enumerate(totals):
            lines.append(f"tl.store(partial + {i}, tl.sum(tl.sum(sum_{variable(ref)}, 1), 0))")
        return lines

    # ---- over rows or columns --------------------------------------------------------------------------

    def _line_kernel(self, name: str, axis: Axis, arguments: Sequence[str]) -> list[str]:
        """Opens a kernel over stretches of rows or columns."""
        height, width = self._field(Geometry.HEIGHT), self._field(Geometry.WIDTH)
        opening = [
            f"row = {axis}_lines + tl.program_id(0).to(tl.int64) * {LINE_ROW}",
            "t = tl.load(row)",
            f"tensor = tensors + t * {self.table.row}",
            f"numbers = cols + t * {len(self.table.cols)}",
            f"length = {height if axis == 'row' else width}",
            f"line = tl.load(row + 1) + tl.arange(0, {LINES})",
            "inside = line < length",
            f"found = {self._room(Geometry.ROWS if axis == 'row' else Geometry.COLUMNS, self._float)}",
        ]
        head = f"def {name}({', '.join([f'{axis}_lines', 'tensors', 'cols', *arguments])}):"
        return ["", "", JIT, head, *indent(opening, 1)]

    def _found(self, ref: Ref) -> str:
        return f"found + {self._index(ref)} * length + line"

    def _keep(self, ref: Ref) -> str:
        return f"tl.store({self._found(ref)}, {variable(ref)}.to({self._float}), inside)"

    def _per_line(self, stage: Stage) -> list[str]:
        """Sums per row or column from those of the tiles, and the rules per row or column, in float64."""
        axis, body = stage.axis, list[str]()
        assert axis is not None
        if stage.sums:
            body += [f"sums = {self._room(Geometry.PARTS if axis == 'row' else Geometry.SUMS, 'tl.float64')}"]
            body += ["count = tl.load(row + 2)"]
        for i, ref in enumerate(stage.sums):
            at = f"sums + ({i} * length + line) * count, 1"
            at = at if axis == "row" else f"sums + {i} * count * length + line, length"
            body.append(f"{variable(ref)} = fold_lines({at}, count, inside, {LANES})")
            body.append(self._keep(ref))
        refs = sorted(number_refs(stage.calls) - set(line_totals(stage.calls)))
        body += [f"{variable(ref)} = {self._number(ref)}" for ref in refs]
        known = set(stage.sums)
        for call in stage.calls:
            for ref in (r for r in call.args if r.kind in (axis, f"{axis}s") and r not in known):
                body.append(f"{variable(ref)} = {self._line_value(ref)}")
            body += self._calls([call], "_64")
            known.update((*call.args, *call.writes))
            body += [self._keep(ref) for ref in call.writes if ref.kind == axis]
        for i, ref in enumerate(totals := line_totals(stage.calls)):
            at = f"{LINE_PARTIALS} + tl.program_id(0).to(tl.int64) * {line_width(self.program)} + {i}"
            body.append(f"tl.store({at}, tl.sum(tl.where(inside, {variable(ref)}, 0.0), 0))")
        given = ["hypers", *([LINE_PARTIALS] if totals else [])]
        return [*self._line_kernel(stage.name, axis, given), *indent(body, 1)]

    def _line_value(self, ref: Ref) -> str:
        """A number per row or column that was computed before, or is state."""
        if ref.kind in AXES:
            return f"tl.load({self._found(ref)}, inside, other=0.0).to(tl.float64)"
        dtype = POINTERS[self.program.cell_dtype(ref.name, self.layout.dtypes[0])]
        return f"read({self._cell(ref.name, dtype)} + line, inside, tl.float64)"

    def _commit_lines(self) -> list[str]:
        """What was computed of the state per row and column becomes state, unless the step is skipped."""
        lines: list[str] = []
        for axis in AXES:
            names = [name for name, of in self.program.kept_vectors if of == axis]
            body = ["inside = line < tl.where(tl.load(skip) == 0, length, 0)"]
            for name in names:
                dtype = self.program.cell_dtype(name, self.layout.dtypes[0])
                pointer = f"{self._cell(name, POINTERS[dtype])} + line"
                value = f"{self._line_value(Ref(axis, name))}"
                body.append(f"put_number({pointer}, {value}, {dtype == 'bool'}, inside)")
            if names:
                lines += [*self._line_kernel(f"commit_{axis}", axis, ["skip"]), *indent(body, 1)]
        return lines


def _open_tile(skip: bool) -> list[str]:
    """See `Tile`."""
    names = {"t": Tile.TENSOR, "top": Tile.TOP, "block": Tile.BLOCK, "down": Tile.DOWN, "downs": Tile.DOWNS}
    return [
        f"row = chunks + tl.program_id(0).to(tl.int64) * {len(Tile)}",
        *(f"{name} = tl.load(row + {at:d})" for name, at in names.items()),
        f"column = tl.multiple_of(tl.load(row + {Tile.COLUMN:d}), 16)",
        f"tall = tl.load(row + {Tile.TALL:d}).to(tl.int32)",
        *(["tall = tl.where(tl.load(skip) == 0, tall, 0)"] if skip else []),
    ]
