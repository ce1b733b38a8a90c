"""Lines of a generated Triton kernel: how elements, numbers, cells are read, computed and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from optx.kernels.step.layout import EIGHT, Columns, Layout, partials_per_chunk, scale_of
from optx.kernels.step.lines import WIDE, Lines
from optx.kernels.step.program import NUMBER_KINDS, Call, Program, Ref
from optx.kernels.step.text import indent, rule_name, variable
from optx.kernels.step.triton_text import JIT

POINTERS = {
    "float32": "tl.float32",
    "float64": "tl.float64",
    "float16": "tl.float16",
    "bfloat16": "tl.uint16",
    "bool": "tl.int8",
    "bits": "tl.uint8",
    "signed8": "tl.int8",
    "nonnegative8": "tl.uint8",
    **{name: f"tl.{name}" for name in ("uint8", "int8", "int16", "int32", "int64")},
}
_SMALL = ("uint8", "int8", "int16")
_NUMBERS = (*NUMBER_KINDS, "cell")


def draws(program: Program, layout: Layout) -> list[str]:
    """The roles that are rounded stochastically when stored, each with bits of its own.

    Moments kept in bfloat16 always are: at beta2 = 0.999 a nearest rounding would never let them fall.
    """
    names = zip(Columns.of(program, layout).roles, layout.dtypes, strict=False)
    low = [role for role, dtype in names if dtype in ("bfloat16", *EIGHT)]
    stored = program.stored_slots
    return [r for r in low if r in stored or (r == "w" and layout.rounding == "stochastic")]


@dataclass(frozen=True)
class Pass:
    """A kernel that goes over all elements.

    Attributes:
        name: of the kernel.
        roles: what it loads, and w where it stores.
        calls: the rules that it runs.
        numbers: what it reads once per tensor: local variables, with their sources.
        body: the lines for a block of elements.
        sums: what it adds up.
        random: whether something is rounded stochastically.
    """

    name: str
    roles: Sequence[str]
    calls: Sequence[Call]
    numbers: Mapping[str, str]
    body: Sequence[str]
    sums: Sequence[Ref] = ()
    random: bool = False

    @property
    def summed(self) -> list[str]:
        """The local variables of its sums."""
        return list(map(variable, self.sums))


class TritonLines(Lines):
    """Of Triton's."""

    def __init__(self, program: Program, layout: Layout) -> None:
        super().__init__(program, layout)
        self.width = partials_per_chunk(program)
        self.math = "tl.float64" if self.wide else "tl.float32"
        self.draws = draws(program, layout)

    def _call(self, call: Call, suffix: str, sums: bool = False) -> str:
        """One rule. What is summed is computed in float64 throughout and stays apart from the registers."""
        if not sums:
            targets, arguments = map(variable, call.writes), map(variable, call.args)
        else:
            targets = (f"x_{variable(r)}" for r in call.writes)
            widen = ".to(tl.float64)" if self.suffix == "_32" else ""
            arguments = (f"d{variable(r)}" if r.kind in _NUMBERS else variable(r) + widen for r in call.args)
        return f"{', '.join(targets)} = {rule_name(call.rule, suffix)}({', '.join(arguments)})"

    def _calls(self, calls: Iterable[Call], suffix: str) -> list[str]:
        """Calls in order; what goes into a slot of whole numbers is one at once."""
        lines: list[str] = []
        for call in calls:
            lines.append(self._call(call, suffix))
            for ref in call.writes:
                dtype, math = "", "tl.float64"
                if ref.kind == "slot":
                    dtype = self.dtypes[ref.name]
                    math = self._math_of(ref.name)
                elif ref.kind == "col" and ref.name in self.program.kept:
                    dtype = self.cells[ref.name]
                if dtype == "bool":
                    lines.append(f"{variable(ref)} = ({variable(ref)} != 0).to({math})")
                elif dtype in (*_SMALL, "int32", "int64"):
                    first = "tl.int32" if dtype in _SMALL else "tl.int64"
                    lines.append(
                        f"{variable(ref)} = whole_number({variable(ref)}, {first}, tl.{dtype}, {math})"
                    )
        return lines

    def _math_of(self, role: str) -> str:
        """The dtype that a role is read in."""
        return "tl.float64" if self.dtypes[role] in WIDE else self.math

    def _number(self, ref: Ref) -> str:
        """Reads a col, hyper, total or cell."""
        if ref.kind == "cell":
            dtype = self.cells[ref.name]
            pointer = self._cell(ref.name, POINTERS[dtype])
            return f"tl.load({pointer})" if dtype == "float64" else f"get_number({pointer})"
        if ref.kind == "col":
            return f"tl.load(numbers + {self.table.cols.index(ref.name)})"
        if ref.kind == "hyper":
            return f"tl.load(hypers + {self.table.hypers.index(ref.name)})"
        return f"tl.load(hypers + {len(self.table.hypers) + self.table.totals.index(ref.name)})"

    def _block_numbers(self, calls: Iterable[Call], sums: Iterable[Call]) -> dict[str, str]:
        """Locals of a chunk kernel, and what they are: for calls in their own dtype, for sums in float64."""
        cast = "" if self.math == "tl.float64" else f".to({self.math})"
        narrow = {variable(r): self._number(r) + cast for r in sorted(number_refs(calls))}
        return narrow | {f"d{variable(r)}": self._number(r) for r in sorted(number_refs(sums))}

    def _loads(self, roles: Sequence[str]) -> list[str]:
        lines = [f"{_register(r)} = {self._read(r)}" for r in roles]
        if self.layout.rounding == "kahan" and "w" in roles:
            lines.insert(roles.index("w") + 1, "w += read(kahan_p + lane, mask, tl.float32)")
        return lines

    def _read(self, role: str) -> str:
        """The elements of a role in the dtype that rules compute in."""
        if role == "w" and self.split:
            return f"read_split(w_p + lane, rest_p + lane, mask, {self.rest_bits})"
        match self.dtypes[role]:
            case "signed8" | "nonnegative8" as dtype:
                scales = stream(scale_of(role))
                return f"read_codes({stream(role)}, {scales}, lane, mask, {dtype != 'signed8'}, {self.math})"
            case "ones":
                return f"tl.full((), 1.0, {self.math})"
            case "bits":
                return f"read_bits({stream(role)}, lane, mask, {self.math})"
            case _:
                return f"read({stream(role)} + lane, mask, {self._math_of(role)})"

    def _on(self, role: str, count: str) -> str:
        """A distance in elements as one in what a role's pointer points at."""
        if role.endswith(scale_of("")):
            return f"{count} // 32"
        return f"{count} // 8" if self.dtypes[role] == "bits" else count

    def _stores(self, stored: list[str], again: list[str]) -> list[str]:
        """Rounds and stores registers; those in ``again`` are what was stored, from then on."""
        lines: list[str] = []
        for role in ("w", *stored):
            register = value = _register(role)
            if role in self.eight or (role == "w" and self.split):
                lines += self._store_format(role, role in again)
                continue
            low = self.dtypes[role] == "bfloat16"
            if low and self.mixed:
                lines.append(f"{register} = {register}.to(tl.float32)")
            if role in self.draws:
                bits = f"random_bits(key, start, lane, step, number, {self.draws.index(role)})"
                value = f"dithered({value}, {bits})"
            elif low:
                value = f"nearest({value})"
            if low and role in again and not (role == "w" and self.layout.rounding == "kahan"):
                lines.append(f"low_{register} = {value}")
                value = f"low_{register}"
            if role == "w" and self.layout.rounding == "kahan":
                lines += [f"low = {value}", "tl.store(w_p + lane, low, mask)"]
                if role in again:
                    lines += ["rest = nearest(w - widen(low))", "tl.store(kahan_p + lane, rest, mask)"]
                    lines.append("w = widen(low) + widen(rest)")
                else:
                    lines.append("tl.store(kahan_p + lane, nearest(w - widen(low)), mask)")
            elif low:
                lines.append(f"tl.store({stream(role)} + lane, {value}, mask)")
                lines += [f"{register} = widen({value})"] if role in again else []
            else:
                lines.append(f"write({stream(role)} + lane, {value}, mask)")
                if role in again:
                    lines.append(f"{register} = {value}.to({POINTERS[self.dtypes[role]]}).to({self.math})")
        return lines

    def _store_made(self, role: str, value: str) -> str:
        """What a function of whole matrices is given, rounded to nearest."""
        if self.dtypes[role] != "bfloat16":
            return f"write({stream(role)} + lane, {value}, mask)"
        narrow = ".to(tl.float32)" if self.mixed else ""
        return f"tl.store({stream(role)} + lane, nearest({value}{narrow}), mask)"

    def _store_format(self, role: str, again: bool) -> list[str]:
        """A moment of 8 bits, or a weight in two parts."""
        register = _register(role)
        if role == "w":
            lines = [f"write_split(w_p + lane, rest_p + lane, w, mask, {self.rest_bits})"]
            return [*lines, *([f"w = {self._read('w')}"] if again else [])]
        squares = self.dtypes[role] == "nonnegative8"
        bits = f"random_bits(key, start, lane, step, number, {self.draws.index(role)})"
        value = f"sqrt({register})" if squares else register
        given = f"{stream(role)}, {stream(scale_of(role))}, {value}, lane, mask, {bits}, {squares}"
        return [f"kept_{register} = write_codes({given})"] + (
            [f"{register} = kept_{register}.to({self.math})"] if again else []
        )

    @property
    def rest_bits(self) -> int:
        """Of a weight in two parts."""
        return 8 * (1 + (self.layout.rounding == "split16"))

    def _streams(self, roles: Sequence[str]) -> list[str]:
        """The roles whose pointers a kernel of these needs."""
        streams = [r for r in roles if r != "kahan" and self.dtypes[r] != "ones"]
        if self.layout.rounding == "kahan" and "w" in streams:
            streams.append("kahan")
        streams += ["rest"] if self.split and "w" in streams else []
        return [*streams, *(scale_of(r) for r in streams if r in self.eight)]

    def _address(self, role: str, first: str) -> str:
        """A pointer to an element of a role, in a chunk kernel."""
        dtype = POINTERS[self.dtypes[role]]
        return f"stream(tensor + {self.table.roles.index(role)}, {dtype}, {first}, ALIGNED)"

    def _step_source(self) -> dict[str, str]:
        """What tells the draws of one step from those of the next, also when a graph is replayed."""
        if self.layout.counted:
            step = f"tl.load(numbers + {self.table.cols.index('step')}).to(tl.int64)"
        else:
            step = "tl.load(random + 1)"
        return {"key": "tl.load(random)", "step": step, "number": f"tl.load(tensor + {self.table.row - 1})"}

    def _block(self, one: Pass, given: Sequence[str]) -> list[str]:
        """``<name>_block``: what a kernel does with one block of elements."""
        arguments = ", ".join([*given, *(["start"] if one.random else []), "lane", "mask"])
        lines = ["", "", JIT, f"def {one.name}_block({arguments}):", *indent(one.body, 1)]
        if one.sums:
            masked = [f"    x_{s} = tl.where(mask, x_{s}, 0.0)" for s in one.summed]
            lines += indent(["if mask is not None:", *masked, f"return {_parts(one)}"], 1)
        return lines

    def _call_block(self, one: Pass, given: Iterable[str]) -> str:
        """Calls it, for what it sums."""
        call = f"{one.name}_block({', '.join(given)})"
        return f"{_parts(one)} = {call}" if one.sums else call

    def _head(self, one: Pass, partials: bool, *more: str) -> list[str]:
        """Opens a kernel over chunks."""
        arguments = ["chunks", "tensors", "cols", "hypers", *(["partials"] if partials else [])]
        arguments += [*(["random"] if one.random else []), *(["skip"] if one.name == "update" else [])]
        arguments += ["BLOCK: tl.constexpr", *more, "ALIGNED: tl.constexpr"]
        return ["", "", JIT, f"def {one.name}({', '.join(arguments)}):"]

    def _numbers(self, one: Pass) -> dict[str, str]:
        """What it reads once per tensor, with what its draws take."""
        return {**one.numbers, **(self._step_source() if one.random else {})}

    def _read_numbers(self, numbers: Mapping[str, str]) -> list[str]:
        """Reads them."""
        found = [f"{local} = {source}" for local, source in numbers.items()]
        return [f"numbers = cols + t * {len(self.table.cols)}", *found]

    def _cell(self, name: str, dtype: str) -> str:
        at = len(self.table.roles) + self.table.cells.index(name)
        return f"tl.load(tensor + {at}).to(tl.pointer_type({dtype}))"

    def _put(self, name: str, value: str) -> str:
        """Stores a number in a cell, unless the step is skipped."""
        dtype = self.cells[name]
        pointer = self._cell(name, POINTERS[dtype])
        if dtype == "float64":
            return f"tl.store({pointer}, {value}, keep)"
        return f"put_number({pointer}, {value}, {dtype == 'bool'}, keep)"


def number_refs(calls: Iterable[Call]) -> set[Ref]:
    """The numbers that calls read."""
    return {r for c in calls for r in c.args if r.kind in _NUMBERS}


def stream(role: str) -> str:
    """A kernel's name for the pointer to a role's elements."""
    return role.replace(".", "_") + "_p"


def _parts(one: Pass) -> str:
    """What a block gives to the sums, as a tuple."""
    return ", ".join(f"x_{s}" for s in one.summed) + "," * (len(one.sums) == 1)


def _register(role: str) -> str:
    return role if role in ("w", "g") else variable(Ref("slot", role))
