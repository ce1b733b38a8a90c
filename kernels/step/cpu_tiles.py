"""Lines of generated CPU kernels that sum over rows and columns, and compute per row and per column.

A chunk of such a program is a tile of the weight as a matrix (`optx.kernels.step.tiles`), walked over row by
row: a number per row is one number in the loop over its elements, numbers per column are loaded beside the
elements, and sums per column are added up in memory that is the tile's own. What is left of each tile is
folded tile after tile, so that the split over threads never shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optx.kernels import cpu
from optx.kernels.step.cpu_lines import CpuLines, Use
from optx.kernels.step.cpu_text import CFUNC, Args, local, open_tile
from optx.kernels.step.layout import Geometry, Layout, partials_per_chunk
from optx.kernels.step.program import Axis, Call, Level, Program, Ref, in_turn
from optx.kernels.step.text import indent, variable
from optx.kernels.step.tiles import Tiles

VALUES, ADDS = "v:", "x:"  # roles of loops: a column's numbers, and where its sums are added up
HYPERS = f"hypers = get_i64(get_i64(args, {Args.NUMBERS:d}), t)"  # those of the tensor's group


class CpuTiles(CpuLines):
    """Of Numba's."""

    def __init__(self, program: Program, layout: Layout) -> None:
        super().__init__(program, layout)
        self.dtypes.update(dict.fromkeys((VALUES + n for n in program.along("column")), self._float))
        summed = (ref for level in program.levels for ref in level.summed("column"))
        self.dtypes.update({ADDS + ref.name: "float64" for ref in summed})

    @property
    def _float(self) -> str:
        return "float64" if self.wide else "float32"

    def _tile_accessors(self) -> list[str]:
        if not self.program.tiled:
            return []
        roles = [role for role in self.dtypes if role[:2] in (VALUES, ADDS)]
        lines: list[str] = []
        for number, role in enumerate(roles, start=len(self.table.roles)):
            dtype = self.dtypes[role]
            lines.append(f"load_{local(role)} = load({dtype!r}, {number})")
            lines.append(f"store_{local(role)} = store({dtype!r}, {number})")
        lines += [f"load_found = load({self._float!r}, 31)", f"store_found = store({self._float!r}, 31)"]
        for name, axis in self.program.vectors:
            dtype, ref = self._vector_dtype(name), variable(_state(axis, name))
            lines += [f"get_{ref} = get_number({dtype!r})", f"put_{ref} = put_number({dtype!r})"]
        return lines

    def _vector_dtype(self, name: str) -> str:
        return self.program.cell_dtype(name, self.layout.dtypes[0])

    def _column_roles(self, calls: Iterable[Call]) -> list[str]:
        """The roles of numbers per column that calls per element read."""
        return sorted({VALUES + r.name for c in calls for r in c.args if r.kind == "column"})

    # ---- passes ---------------------------------------------------------------------------------------

    def _add_up(self, level: Level) -> list[str]:
        """Adds an element's summands to its column's sums."""
        lines: list[str] = []
        for ref in level.summed("column"):
            role = local(ADDS + ref.name)
            added = f"load_{role}({role}_p, i) + x_{variable(ref)}"
            lines.append(f"store_{role}({role}_p, i, {added}, NONE)")
        return lines

    def _tile_callback(
        self, name: str, use: Use, returned: Sequence[Ref], per_row: Sequence[Ref]
    ) -> list[str]:
        """The callback that hands the rows of tiles to ``<name>_chunk``.

        Args:
            name: of the pass.
            use: what it touches.
            returned: the sums that it returns.
            per_row: those of them that are sums per row.
        """
        g = self.table.geometry
        inner = [*self._matrix(), *self._pointers(use)]
        if use.numbers or use.random:
            inner += [f"cols = get_i64(args, {Args.COLS:d}) + t * {8 * len(self.table.cols)}", HYPERS]
        inner += self._numbers(use.numbers, "F({})")
        if use.random:
            key = f"get_i64(hypers, {self.table.key})"
            inner.append(f"key = mix({key}, get_i64(tensor, {self.table.row - 1}))")
        totals = [ref for ref in returned if ref not in per_row]
        inner += [f"sum_{variable(ref)} = 0.0" for ref in totals]
        given = [
            f"{local(role)}_p" if role[:2] in (VALUES, ADDS) else use.moved(role, "start")
            for role in use.addressed
        ]
        walk = ["start = line * width + column"]
        for ref in (ref for ref in use.numbers if ref.kind == "row"):
            walk.append(f"{variable(ref)} = {self._found(ref, 'line')}")
        call = f"{name}_chunk({', '.join([*given, *map(variable, use.numbers), 'start', 'n', *use.key])})"
        walk.append(f"sums = {call}" if returned else call)
        for i, ref in enumerate(returned):
            if ref in per_row:
                part = f"({per_row.index(ref)} * height + line) * blocks + block"
                walk.append(f"put_f64(get_i64(tensor, {g + Geometry.PARTS}), {part}, sums[{i}])")
            else:
                walk.append(f"sum_{variable(ref)} += sums[{i}]")
        inner += ["for line in range(top, top + tall):", *indent(walk, 1)]
        if totals:
            width = partials_per_chunk(self.program)
            inner.append(f"partials = get_i64(args, {Args.PARTIALS:d}) + chunk * {8 * width}")
            inner += [f"put_f64(partials, {i}, sum_{variable(ref)})" for i, ref in enumerate(totals)]
        opening = indent(open_tile(name == "update"), 1)
        return ["", "", CFUNC, f"def {name}(pointer):", *opening, *indent(inner, 2)]

    def _pointers(self, use: Use) -> list[str]:
        """Where the roles of a tile's tensor begin; of numbers per column, where the tile's do."""
        lines: list[str] = []
        adds = [role for role in use.addressed if role.startswith(ADDS)]
        for role in use.addressed:
            if role.startswith(ADDS):
                lines.append(f"{local(role)}_p = get_i64(row, 6) + {8 * adds.index(role)} * n")
                lines += ["for i in range(n):", f"    put_f64({local(role)}_p, i, 0.0)"]
            elif role.startswith(VALUES):
                at = f"{self._index(Ref('column', role[2:]))} * width + column"
                base = f"get_i64(tensor, {self.table.geometry + Geometry.COLUMNS})"
                lines.append(f"{local(role)}_p = {base} + ({at}) * {cpu.ITEMSIZE[self._float]}")
            else:
                lines.append(f"{local(role)}_p = get_i64(tensor, {self.table.roles.index(role)})")
        return lines

    # ---- once per tensor ---------------------------------------------------------------------------------

    def _matrix(self) -> list[str]:
        """What a kernel needs to know of a tensor as a matrix."""
        names = (("height", Geometry.HEIGHT), ("width", Geometry.WIDTH), ("blocks", Geometry.BLOCKS))
        tensor = f"tensor = get_i64(args, {Args.TENSORS:d}) + t * {8 * self.table.row}"
        return [tensor, *(f"{name} = get_i64(tensor, {self.table.geometry + at})" for name, at in names)]

    def _index(self, ref: Ref) -> int:
        return self.program.named(ref.kind).index(ref.name)

    def _at(self, ref: Ref, line: str) -> str:
        """Where the number of a row or column is: an address, and an index."""
        at, length = (Geometry.ROWS, "height") if ref.kind == "row" else (Geometry.COLUMNS, "width")
        return f"get_i64(tensor, {self.table.geometry + at}), {self._index(ref)} * {length} + {line}"

    def _found(self, ref: Ref, line: str) -> str:
        return f"load_found({self._at(ref, line)})"

    def _keep(self, ref: Ref, line: str, value: str) -> str:
        return f"store_found({self._at(ref, line)}, F({value}), NONE)"

    def _fold_axes(self, level: Level) -> list[str]:
        """Sums per row and column, from those of the tiles."""
        lines: list[str] = []
        for i, ref in enumerate(level.summed("row")):
            part = f"get_i64(tensor, {self.table.geometry + Geometry.PARTS}), ({i} * height + line) * blocks"
            lines += ["for line in range(height):", "    total = 0.0", "    for block in range(blocks):"]
            lines += [f"        total += get_f64({part} + block)", f"    {self._keep(ref, 'line', 'total')}"]
        sums = f"get_i64(tensor, {self.table.geometry + Geometry.SUMS})"
        first, chunks = f"get_i64(args, {Args.FIRST:d})", f"get_i64(args, {Args.CHUNKS:d})"
        for i, ref in enumerate(level.summed("column")):
            at = f"{i} * width + "
            lines += ["for line in range(width):", f"    put_f64({sums}, {at}line, 0.0)"]
            lines.append(f"for chunk in range(get_i64({first}, t), get_i64({first}, t + 1)):")
            lines += [f"    row = {chunks} + chunk * {8 * Tiles.ROW}", "    n = get_i64(row, 4)"]
            lines += ["    for line in range(n):", f"        at = {at}get_i64(row, 3) + line"]
            added = f"get_f64({sums}, at) + get_f64(get_i64(row, 6), {i} * n + line)"
            lines.append(f"        put_f64({sums}, at, {added})")
            lines.append("for line in range(width):")
            lines.append("    " + self._keep(ref, "line", f"get_f64({sums}, {at}line)"))
        return lines

    def _in_order(self, calls: Iterable[Call]) -> list[str]:
        """Calls per tensor, and per row or column in loops over these."""
        lines: list[str] = []
        for axis, some in in_turn(calls):
            lines += self._calls(some, "_64") if axis is None else self._along(axis, some)
        return lines

    def _along(self, axis: Axis, calls: Sequence[Call]) -> list[str]:
        """Calls per row or column: what they write as numbers of the tensor is summed."""
        body: list[str] = []
        known: set[Ref] = set()
        totals: list[Ref] = []
        for call in calls:
            for ref in (r for r in call.args if r.kind in (axis, f"{axis}s") and r not in known):
                size = cpu.ITEMSIZE[self._vector_dtype(ref.name)] if ref.kind != axis else 0
                at = f"get_i64(tensor, {self._cell(ref.name)}) + line * {size}" if size else ""
                value = f"get_{variable(ref)}({at})" if size else f"np.float64({self._found(ref, 'line')})"
                body.append(f"{variable(ref)} = {value}")
                known.add(ref)
            body += self._calls([call], "_64")
            known.update(call.writes)
            body += [self._keep(r, "line", variable(r)) for r in call.writes if r.kind == axis]
            totals += [ref for ref in call.writes if ref.kind == "col"]
        body += [f"sum_{variable(ref)} += {variable(ref)}" for ref in totals]
        length = "height" if axis == "row" else "width"
        return [
            *(f"sum_{variable(ref)} = 0.0" for ref in totals),
            f"for line in range({length}):",
            *indent(body, 1),
            *(f"{variable(ref)} = sum_{variable(ref)}" for ref in totals),
        ]

    def _commit_vectors(self) -> list[str]:
        """What was computed of the state per row and column becomes state."""
        lines: list[str] = []
        for name, axis in self.program.kept_vectors:
            at = f"get_i64(tensor, {self._cell(name)}) + line * {cpu.ITEMSIZE[self._vector_dtype(name)]}"
            new = f"np.float64({self._found(Ref(axis, name), 'line')})"
            lines.append(f"for line in range({'height' if axis == 'row' else 'width'}):")
            lines.append(f"    put_{variable(_state(axis, name))}({at}, {new})")
        return lines


def _state(axis: Axis, name: str) -> Ref:
    return Ref("rows" if axis == "row" else "columns", name)
