"""What generated code of every compiler says of one program in one layout."""

from __future__ import annotations

from collections.abc import Iterable

from optx.kernels.step.layout import EIGHT, SPLIT, Columns, Layout
from optx.kernels.step.program import W0, Call, Program, Ref, given

WIDE = ("float64", "int32", "int64")  # read in float64


class Lines:
    """Of one program in one layout."""

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program, self.layout = program, layout
        self.table = Columns.of(program, layout)
        self.wide = layout.dtypes[0] == "float64"
        self.suffix = "_64" if self.wide else "_32"
        beside = layout.beside(program.slots)
        self.dtypes = dict(zip(self.table.roles, (*layout.dtypes, *beside.values()), strict=True))
        self.eight = [name for name in program.slots if self.dtypes[name] in EIGHT]
        self.low = any(self.dtypes[name] in ("bfloat16", *EIGHT) for name in program.slots) and not self.wide
        self.split = layout.rounding in SPLIT
        self.cells = {n: program.cell_dtype(n, layout.dtypes[0]) for n in program.cells}
        # Whether a float64 (or an integer that needs one) can get into what a float32 rule computes.
        self.mixed = self.wide or any(dtype in WIDE for dtype in self.dtypes.values())

    def _inverted(self, call: Call) -> list[str]:
        """Arguments of a rule that an element's number is multiplied by the inverse of, not divided by them.

        They are what a base's own scalars are, such as AdamW's correction. Where moments have fewer bits a
        step is bound by its divisions, and a rounding more is far below a moment's own.
        """
        if not self.low:
            return []
        pairs = zip(call.rule.reads, call.args, strict=True)
        return [name for name, ref in pairs if ref.kind == "col" and ref.name.startswith("base.")]

    def _roles(self, calls: Iterable[Call]) -> list[str]:
        """Roles whose elements some calls touch, in table order."""
        return self._in_table({r for c in calls for r in (*c.args, *c.writes)})

    def _read_roles(self, calls: Iterable[Call]) -> list[str]:
        """Roles whose elements some calls need from memory, in table order."""
        return self._in_table(given(calls))

    def _in_table(self, refs: Iterable[Ref]) -> list[str]:
        used = {"w" if r.name == "w0" else r.name for r in refs if r.kind in ("reg", "slot")}
        return [role for role in self.table.roles if role in used]

    def _start(self, calls: Iterable[Call]) -> list[str]:
        """Keeps the weight as it was loaded, where a rule reads it."""
        return ["w0 = w"] if any(W0 in c.args for c in calls) else []

    def _loses(self, role: str) -> bool:
        """Whether storing a role's register may round it (whole numbers are made before)."""
        dtype = self.dtypes[role]
        return dtype in ("bfloat16", "float16", *EIGHT) or (dtype == "float32" and self.mixed)
