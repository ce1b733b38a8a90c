"""Softmax's loops over a row as vector instructions for Numba, which would not find them by itself.

What a loop carries is a pair in each lane, and the larger exponent of two decides what is kept: LLVM has no
such reduction. All loops are made by `walk`: they take 128 bytes of arithmetic at a time, two of AVX-512's
vectors or four of AVX2's, and what is left of a row by way of a buffer that is filled up with -inf, which
adds nothing. No table and no call: an exponential is some twenty instructions.
"""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config

from optx.kernels.cpu import I16, I32, I64, ITEMSIZE, spread
from optx.kernels.softmax.layout import FLOAT32, FLOAT64, Numbers

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_STORED = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": I16}


def _has_avx512() -> bool:
    """Whether that is compiled for; see `optx.kernels.processor`."""
    said: str | None = config.CPU_FEATURES
    return "+avx512f" in (binding.get_host_cpu_features().flatten() if said is None else said).split(",")


def _some(b: Any, vector: Any, first: int, count: int) -> Any:
    """So many lanes from one on."""
    return b.shuffle_vector(vector, vector, _places(range(first, first + count)))


def _joined(b: Any, low: Any, high: Any) -> Any:
    return b.shuffle_vector(low, high, _places(range(2 * low.type.count)))


def _places(lanes: range) -> Any:
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


@dataclass(frozen=True)
class Lanes:
    """Vectors of one dtype of arithmetic, and what is done with them; ``b`` is the builder."""

    wide: bool
    count: int

    @property
    def numbers(self) -> Numbers:
        """The constants."""
        return FLOAT64 if self.wide else FLOAT32

    @property
    def kind(self) -> Any:
        """Of a lane."""
        return F64 if self.wide else F32

    def all(self, value: float, count: int = 0) -> Any:
        """A number in every lane."""
        count = count or self.count
        return ir.Constant(ir.VectorType(self.kind, count), [value] * count)

    def whole(self, value: int, count: int) -> Any:
        """A whole number of as many bits in every lane."""
        return ir.Constant(ir.VectorType(I64 if self.wide else I32, count), [value] * count)

    def call(self, b: Any, name: str, *values: Any) -> Any:
        """One of LLVM's functions on vectors."""
        kind = values[0].type
        of = ir.FunctionType(kind, [kind] * len(values))
        suffix = f"v{kind.count}{'f64' if self.wide else 'f32'}"
        return b.call(cgutils.get_or_insert_function(b.module, of, f"llvm.{name}.{suffix}"), values)

    def above(self, b: Any, x: Any, least: Any) -> Any:
        """``x``, or ``least`` where it is less; nan stays."""
        return b.select(b.fcmp_ordered("<", x, least), least, x)

    def pair(self, b: Any, x: Any) -> tuple[Any, Any]:
        """``e**x`` as (m, n), of which x = -inf is given as 2 to some finite power that is as good."""
        c = self.numbers
        x = self.above(b, x, self.all(c.floor))
        n = self.call(b, "rint", b.fmul(x, self.all(c.log2e)))
        t = self.call(b, "fma", n, self.all(-c.ln2), x)
        t = self.call(b, "fma", n, self.all(-c.ln2_rest), t)
        m = self.all(c.powers[-1])
        for power in reversed(c.powers[:-1]):
            m = self.call(b, "fma", m, t, self.all(power))
        return m, n

    def power(self, b: Any, n: Any) -> Any:
        """``2**n`` for whole numbers up to 0; 0 where that is below the least normal number."""
        c, count = self.numbers, n.type.count
        # A number of this size has whole ones in its lowest bits, and they are the exponent's.
        moved = b.fadd(
            self.above(b, n, self.all(-c.bias, count)), self.all(1.5 * 2.0**c.mantissa + c.bias, count)
        )
        bits = b.bitcast(moved, ir.VectorType(I64 if self.wide else I32, count))
        return b.bitcast(b.shl(bits, self.whole(c.mantissa, count)), n.type)

    def times_power(self, b: Any, m: Any, n: Any) -> Any:
        """``m 2**n`` for whole n up to 0: one instruction of AVX-512's, which keeps what is not normal."""
        width = 8 if self.wide else 16
        if n.type.count % width or not _has_avx512():
            return b.fmul(m, self.power(b, n))
        kind, mask = ir.VectorType(self.kind, width), ir.IntType(width)
        of = ir.FunctionType(kind, [kind, kind, kind, mask, I32])
        name = f"llvm.x86.avx512.mask.scalef.{'pd' if self.wide else 'ps'}.512"
        scalef = cgutils.get_or_insert_function(b.module, of, name)
        made: list[Any] = []
        for first in range(0, n.type.count, width):
            few = [_some(b, v, first, width) for v in (m, n)]
            made.append(b.call(scalef, [*few, few[0], mask(-1), I32(4)]))  # 4: rounded as always
        while len(made) > 1:
            made = [_joined(b, p, q) for p, q in zip(made[::2], made[1::2], strict=True)]
        return made[0]

    def add(self, b: Any, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
        """The sum of two pairs: powers of two that are 1 at most change no mantissa."""
        n = b.select(b.fcmp_ordered(">", one[1], other[1]), one[1], other[1])
        kept, added = (self.times_power(b, m, b.fsub(e, n)) for m, e in (one, other))
        return b.fadd(kept, added), n

    def scaled(self, b: Any, x: Any, scale: Any, n: Any) -> Any:
        """``e**x scale 2**-n``."""
        m, own = self.pair(b, x)
        return self.times_power(b, b.fmul(m, scale), b.fsub(own, n))

    def exponential(self, b: Any, x: Any) -> Any:
        """``e**x`` for x up to 0."""
        return self.times_power(b, *self.pair(b, x))

    def every(self, b: Any, value: Any) -> Any:
        """A number that is known at run time in every lane."""
        return spread(b, value, self.count)

    def folded(self, b: Any, parts: Sequence[Any], join: Callable[[Any, Any], Any]) -> list[Any]:
        """What ``join`` makes of all lanes: of two halves, of their halves, and so on."""
        count = parts[0].type.count
        while count > 1:
            count //= 2
            parts = join(*([_some(b, v, first, count) for v in parts] for first in (0, count)))
        return [b.extract_element(v, I32(0)) for v in parts]


def lanes(dtype: str) -> Lanes:
    """Those in which elements of a dtype are computed with."""
    wide = dtype == "float64"
    return Lanes(wide, 16 if wide else 32)


class Row:
    """The elements of a row in memory: ``address`` and ``dtype``."""

    def __init__(self, b: Any, address: Any, dtype: str) -> None:
        self.b, self.dtype, self.size = b, dtype, ITEMSIZE[dtype]
        self.lanes = lanes(dtype)
        self.stored = ir.VectorType(_STORED[dtype], self.lanes.count)
        self.address = address

    def _place(self, address: Any) -> Any:
        return self.b.inttoptr(address, self.stored.as_pointer())

    def at(self, index: Any) -> Any:
        """The address of an element."""
        return self.b.add(self.address, self.b.mul(index, I64(self.size)))

    def load(self, address: Any) -> Any:
        """A vector."""
        b, count = self.b, self.lanes.count
        held = b.load(self._place(address))
        held.align = self.size
        if self.dtype == "bfloat16":  # a float32 whose lower half is missing
            bits = b.zext(held, ir.VectorType(I32, count))
            return b.bitcast(b.shl(bits, self.lanes.whole(16, count)), ir.VectorType(F32, count))
        return b.fpext(held, ir.VectorType(F32, count)) if self.dtype == "float16" else held

    def store(self, value: Any, address: Any, past_the_caches: bool = False) -> None:
        """A vector, rounded to nearest; past the caches at multiples of 64 bytes alone."""
        b = self.b
        if self.dtype == "bfloat16":
            value = self._halved(value)
        elif self.dtype == "float16":
            value = b.fptrunc(value, self.stored)
        instruction = b.store(value, self._place(address))
        instruction.align = 64 if past_the_caches else self.size
        if past_the_caches:
            instruction.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    def _halved(self, value: Any) -> Any:
        b, count = self.b, self.lanes.count
        bits = b.bitcast(value, ir.VectorType(I32, count))
        odd = b.and_(b.lshr(bits, self.lanes.whole(16, count)), self.lanes.whole(1, count))
        up = b.add(bits, b.add(odd, self.lanes.whole(0x7FFF, count)))
        kept = b.select(
            b.fcmp_unordered("uno", value, value), b.or_(bits, self.lanes.whole(1 << 22, count)), up
        )
        return b.trunc(b.lshr(kept, self.lanes.whole(16, count)), self.stored)

    def buffer(self, value: float) -> Row:
        """Room for one vector, filled with a number."""
        room = cgutils.alloca_once(self.b, self.stored)
        room.align = 64
        made = Row(self.b, self.b.ptrtoint(room, I64), self.dtype)
        made.store(self.lanes.all(value), made.address)
        return made

    def copy(self, to: Row, count: Any) -> None:
        """So many elements, one by one, as they are."""
        b, kind = self.b, _STORED[self.dtype].as_pointer()
        with cgutils.for_range(b, count, intp=I64) as loop:
            held = b.load(b.inttoptr(self.at(loop.index), kind))
            held.align = self.size
            b.store(held, b.inttoptr(to.at(loop.index), kind)).align = self.size


def walk(
    b: Any,
    count: Any,
    reads: Sequence[Row],
    body: Callable[..., Any],
    writes: Row | None = None,
    past_the_caches: bool = False,
    behind: float = float("-inf"),
) -> None:
    """Call ``body`` with a vector of each row; what it gives goes to ``writes``.

    Args:
        b: the builder.
        count: of the rows' elements.
        reads: of one dtype of arithmetic.
        body: of the vectors.
        writes: where to.
        past_the_caches: write so that memory need not be read first; all addresses are multiples of 64 then.
        behind: what a vector has behind a row's end.
    """
    step = reads[0].lanes.count
    whole = b.and_(count, I64(-step))
    with cgutils.for_range(b, b.sdiv(whole, I64(step)), intp=I64) as loop:
        at = b.mul(loop.index, I64(step))
        made = body(*(row.load(row.at(at)) for row in reads))
        if writes is not None:
            writes.store(made, writes.at(at), past_the_caches)
    left = b.sub(count, whole)
    with b.if_then(b.icmp_signed(">", left, I64(0)), likely=False):
        rooms: list[Row] = []
        for row in reads:
            room = row.buffer(behind)
            Row(b, row.at(whole), row.dtype).copy(room, left)
            rooms.append(room)
        made = body(*(room.load(room.address) for room in rooms))
        if writes is not None:
            room = writes.buffer(0.0)
            room.store(made, room.address)
            room.copy(Row(b, writes.at(whole), writes.dtype), left)
