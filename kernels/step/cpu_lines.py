"""Lines of a generated CPU kernel: how a program's elements, numbers, cells are read, computed, written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from optx.kernels import cpu
from optx.kernels.step.cpu_text import PART, Args, in_groups, local, register
from optx.kernels.step.layout import EIGHT, scale_of
from optx.kernels.step.lines import Lines
from optx.kernels.step.program import NUMBER_KINDS, W0, Call, G, Ref
from optx.kernels.step.text import indent, rule_lines, rule_name, variable

SCALE = scale_of("")


@dataclass(frozen=True)
class Use:
    """What one chunk kernel touches: roles it loads, roles whose address it needs, numbers."""

    roles: list[str]
    addressed: list[str]
    numbers: list[Ref]
    random: bool
    dtypes: dict[str, str]

    @property
    def key(self) -> list[str]:
        """The argument that draws are made from, where there are any."""
        return ["key"] if self.random else []

    @property
    def pointers(self) -> list[str]:
        """The arguments that are addresses."""
        return [f"{local(role)}_p" for role in self.addressed]

    @property
    def packed(self) -> list[str]:
        """Those whose address is of bits, which a run is given as bytes."""
        return [role for role in self.addressed if self.dtypes[role] == "bits"]

    @property
    def eight(self) -> list[str]:
        """Moments of 8 bits, which a run is given in float32 too."""
        return [role for role in self.addressed if self.dtypes[role] in EIGHT]

    @property
    def rooms(self) -> list[str]:
        """The arguments that say where a run has those."""
        return [*(f"{local(role)}_b" for role in self.eight), *(["spare"] if self.eight else [])]

    def moved(self, role: str, count: str) -> str:
        """The address of a role so many elements on."""
        if self.dtypes[role] == "bits":
            by = f"({count} >> 3)"
        elif role.endswith(SCALE):
            by = f"({count} >> 5) * 2"
        else:
            by = f"{count} * {self.itemsize(role)}"
        return f"{local(role)}_p + {by}"

    def itemsize(self, role: str) -> int:
        """Bytes of an element."""
        return 1 if self.dtypes[role] in EIGHT else cpu.ITEMSIZE[self.dtypes[role]]


class CpuLines(Lines):
    """Of Numba's."""

    def _accessors(self) -> list[str]:
        lines: list[str] = []
        draw = self.layout.rounding == "stochastic"
        for number, role in enumerate(self.table.roles):
            dtype = self.dtypes[role]
            # Moments kept in bfloat16 are always rounded stochastically: at beta2 = 0.999 a nearest
            # rounding would never let them fall.
            exact = ("kahan", *self.program.scratch)
            dither = dtype == "bfloat16" and (draw if role == "w" else role not in exact)
            name = local(role)
            if role.endswith(SCALE) or role == "rest":
                continue  # read and written together with what they go with
            if role == "w" and self.split:
                rest = self.table.roles.index("rest")
                for done in ("load", "store"):
                    lines.append(f"{done}_w = {done}_split({self.layout.rounding!r}, 0, {rest})")
                continue
            if dtype in EIGHT:
                lines += self._eight_accessors(number, role)
                dtype = "float32"  # in a run
            if role in self.program.packed:  # only read; a run's bits come as bytes
                lines += [f"load_{name} = load('bool', {number})"] if dtype != "ones" else []
                continue
            lines.append(f"load_{name} = load({dtype!r}, {number})")
            lines.append(f"store_{name} = store({dtype!r}, {number}, {dither})")
        for name, dtype in self.cells.items():
            if dtype != "float64":
                lines.append(f"get_{variable(Ref('cell', name))} = get_number({dtype!r})")
                lines.append(f"put_{variable(Ref('cell', name))} = put_number({dtype!r})")
        whole = sorted({d for d in (*self.dtypes.values(), *self.cells.values()) if d in cpu.INTEGERS})
        for dtype in whole:
            lines.append(f"as_{dtype} = whole_number({dtype!r}, {self.wide})")
            lines.append(f"as_wide_{dtype} = whole_number({dtype!r}, True)")
        return lines

    def _eight_accessors(self, number: int, role: str) -> list[str]:
        """What decodes and encodes a group of a moment; for rules that sum it, as it was stored."""
        scopes = f"{self.dtypes[role]!r}, {number}, {self.table.roles.index(scale_of(role))}"
        keep = role in self._roles(self.program.left)
        return [
            f"decode_{local(role)} = decode_group({scopes})",
            f"encode_{local(role)} = encode_group({scopes}, {keep})",
            f"top_{local(role)} = top_of_group({number})",
            f"scales_{local(role)} = scales_of_groups({self.dtypes[role]!r})",
        ]

    def _rooms(self) -> list[str]:
        """Functions that go over a run's groups, and where a run has what only registers have."""
        number = "float64" if self.wide else "float32"
        lines = [f"spill_room = room({2 if self.wide else 1} * ROOM)"] if self._spilt() else []
        for scope, name in enumerate(self._spilt(), start=len(self.table.roles)):
            lines += [f"{done}_{name} = {done}({number!r}, {scope})" for done in ("load", "store")]
        return [*lines, *(line for role in self.eight for line in in_groups(local(role)))]

    def _spilt(self) -> list[str]:
        """Where registers that observing rules read, and that no memory has, wait for them."""
        return [f"{variable(ref)}_r" for ref in self._spilt_refs()]

    def _spilt_refs(self) -> list[Ref]:
        return sorted({r for c in self.program.observe for r in c.args if r in (G, W0) or r.kind == "local"})

    def _spill(self) -> list[str]:
        pairs = zip(self._spilt(), self._spilt_refs(), strict=True)
        return [f"store_{room}({room}, i, {variable(ref)}, NONE)" for room, ref in pairs]

    def _unspill(self) -> list[str]:
        pairs = zip(self._spilt(), self._spilt_refs(), strict=True)
        return [f"{variable(ref)} = load_{room}({room}, i)" for room, ref in pairs]

    def _calls(self, calls: Iterable[Call], suffix: str) -> list[str]:
        """Calls in order; what goes into a slot of whole numbers is one at once."""
        lines: list[str] = []
        for call in calls:
            given, targets = list(map(variable, call.args)), list(map(variable, call.writes))
            inverted = self._inverted(call) if suffix == "_32" else ()
            lines += rule_lines(call.rule, given, targets, suffix, self._number(suffix), inverted)
            for ref in call.writes:
                name = variable(ref)
                if ref.kind == "slot" and (dtype := self.dtypes[ref.name]) in cpu.INTEGERS:
                    lines.append(f"{name} = as_{dtype}({name})")
                elif ref.kind == "col" and ref.name in self.program.kept:
                    dtype = self.cells[ref.name]
                    lines += [f"{name} = as_wide_{dtype}({name})"] if dtype in cpu.INTEGERS else []
        return lines

    def _number(self, suffix: str) -> Callable[[float], str]:
        """How literals are written: Numba widens ``float32 * 1.0`` to float64."""
        narrow = suffix in ("_32", "_lane")
        return lambda value: f"F({float(value)!r})" if narrow else repr(float(value))

    def _sum(self, call: Call, suffix: str) -> str:
        """A call of a function, in which products may be fused with additions."""
        targets = ", ".join("x_" + variable(r) for r in call.writes)
        return f"{targets} = {rule_name(call.rule, suffix)}({', '.join(map(variable, call.args))})"

    def _numbers(self, refs: Iterable[Ref], cast: str) -> list[str]:
        """Lines that read cols, hypers and totals into locals."""
        lines: list[str] = []
        for ref in sorted(set(refs)):
            if ref.kind == "col":
                source = f"get_f64(cols, {self.table.cols.index(ref.name)})"
            elif ref.kind == "hyper":
                source = f"get_f64(hypers, {self.table.hypers.index(ref.name)})"
            elif ref.kind == "total":
                source = f"get_f64(hypers, {len(self.table.hypers) + self.table.totals.index(ref.name)})"
            elif ref.kind == "cell":
                source = self._get_cell(ref.name)
            else:
                continue
            lines.append(f"{variable(ref)} = {cast.format(source)}")
        return lines

    def _loads(self, roles: Sequence[str]) -> list[str]:
        lines: list[str] = []
        for role in roles:
            value = f"load_{local(role)}({local(role)}_{'b' if role in self.eight else 'p'}, i)"
            if self.dtypes[role] == "ones":
                value = "F(1.0)"
            if role == "w" and self.split:
                value = "load_w(w_p, rest_p, i)"
            if role == "w" and self.layout.rounding == "kahan":
                value += " + load_kahan(kahan_p, i)"
            lines.append(f"{register(role)} = {value}")
        return lines

    def _stores(self, stored: list[str], low: list[str], draws_w: bool) -> list[str]:
        """Each bfloat16 role takes 16 fresh random bits; one draw of 32 serves two."""
        dithered = [*(["w"] if draws_w else []), *low]
        lines: list[str] = []
        bits: dict[str, str] = {}
        for number, role in enumerate(dithered):
            draw = f"bits_{number // 2}"
            if number % 2 == 0:
                lines.append(f"{draw} = random_bits(i, start, {key_of(number)})")
            bits[role] = draw if number % 2 == 0 else f"upper_half({draw})"
        if self.layout.rounding == "kahan":
            lines += [
                "store_w(w_p, i, w, NONE)",
                "store_kahan(kahan_p, i, w - load_w(w_p, i), NONE)",
            ]
        elif self.split:
            lines.append("store_w(w_p, rest_p, i, w)")
        else:
            lines.append(f"store_w(w_p, i, w, {bits.get('w', 'NONE')})")
        for role in stored:
            name = local(role)
            if role in self.eight:
                # Of second moments the roots: the update has taken them already.
                root = self.dtypes[role] == "nonnegative8"
                value = f"sqrt({register(role)})" if root else register(role)
                lines.append(f"store_{name}({name}_b, i, {value}, NONE)")
                continue
            lines.append(f"store_{name}({name}_p, i, {register(role)}, {bits.get(role, 'NONE')})")
        return lines

    def _loop(self, name: str, arguments: str, body: list[str], sums: list[str], add: str) -> list[str]:
        """A function that runs ``body`` for each of ``n`` elements, and returns the sums it took."""
        zero = "np.float32(0.0)" if add == "add_lanes" else "0.0"
        result = "".join(f"sum_{i}, " for i in range(len(sums)))
        return [
            *["", "", PART, f"def {name}({arguments}):"],
            *indent((f"sum_{i} = {zero}" for i in range(len(sums))), 1),
            "    for i in range(n):",
            *indent([*body, *(f"sum_{i} = {add}(sum_{i}, {s})" for i, s in enumerate(sums))], 2),
            *indent([f"return ({result.rstrip()})"] if sums else [], 1),
        ]

    def _widen(self, roles: Iterable[str], sums: Iterable[Call] = ()) -> list[str]:
        """Makes registers float64: those of some roles, and others that sums read."""
        read = {
            variable(r): None for c in sums for r in c.args if r.kind not in (*NUMBER_KINDS, "cell", "row")
        }
        names = dict.fromkeys((*map(register, roles), *sorted(read)))
        return [f"{name} = np.float64({name})" for name in names]

    def _use(self, calls: Sequence[Call], roles: list[str], random: bool = False) -> Use:
        beside = [r for r in ("kahan", "rest") if r in self.dtypes and "w" in roles]
        beside += [scale_of(role) for role in roles if role in self.eight]
        numbers = {r for c in calls for r in c.args if r.kind in (*NUMBER_KINDS, "cell", "row")}
        addressed = [role for role in (*roles, *beside) if self.dtypes[role] != "ones"]
        return Use(roles, addressed, sorted(numbers), random, self.dtypes)

    def _fold(self, names: list[Ref], width: int) -> list[str]:
        if not names:
            return []
        first = f"get_i64(args, {Args.FIRST:d})"
        lines = [f"{variable(r)} = 0.0" for r in names]
        lines.append(f"for chunk in range(get_i64({first}, t), get_i64({first}, t + 1)):")
        lines.append(f"    partials = get_i64(args, {Args.PARTIALS:d}) + chunk * {8 * width}")
        lines += [f"    {variable(r)} += get_f64(partials, {i})" for i, r in enumerate(names)]
        return lines

    def _cell(self, name: str) -> int:
        return len(self.table.roles) + self.table.cells.index(name)

    def _get_cell(self, name: str) -> str:
        address = f"get_i64(tensor, {self._cell(name)})"
        if self.cells[name] == "float64":
            return f"get_f64({address}, 0)"
        return f"get_{variable(Ref('cell', name))}({address})"

    def _put_cell(self, name: str, value: str) -> str:
        address = f"get_i64(tensor, {self._cell(name)})"
        if self.cells[name] == "float64":
            return f"put_f64({address}, 0, {value})"
        return f"put_{variable(Ref('cell', name))}({address}, {value})"


def decoding(use: Use, role: str, length: str) -> str:
    """Decodes a run of a moment of 8 bits."""
    name = local(role)
    moved = f"{use.moved(role, 'at')}, {use.moved(scale_of(role), 'at')}"
    return f"decode_{name}_run({moved}, {length}, {name}_b, spare)"


def encoding(role: str, number: int) -> str:
    """Encodes a run of one, with draws of its own."""
    name = local(role)
    given = f"{name}_p, {local(scale_of(role))}_p, n, {name}_b, spare, start, {key_of(number)}"
    return f"encode_{name}_run({given})"


def key_of(number: int) -> str:
    """The key of a role's draws, one for a run: it has what an element's number has above 32 bits, too."""
    return f"mix(key, (start >> 32) + {number << 32})"
