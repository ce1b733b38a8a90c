"""What the loops do with a row, or a piece of one: instructions for Numba, for one dtype of elements."""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import functools
from typing import Any

import numba.core.types as nt
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from optx.kernels.cpu import I32, I64
from optx.kernels.softmax.vectors import Lanes, Row, lanes, walk


def math_of(dtype: str) -> tuple[str, Any]:
    """The dtype of arithmetic, by its name and as Numba's."""
    return ("float64", nt.float64) if dtype == "float64" else ("float32", nt.float32)


def _single(b: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, 1)
    return b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))


def _pair_at(b: Any, own: Lanes, address: Any) -> tuple[Any, Any]:
    pointer = b.inttoptr(address, own.kind.as_pointer())
    return pointer, b.gep(pointer, [I64(1)])


def _add_at(b: Any, own: Lanes, address: Any, m: Any, n: Any) -> None:
    """Add a pair to the one at an address."""
    places = _pair_at(b, own, address)
    held = [_single(b, b.load(place)) for place in places]
    made = own.add(b, (held[0], held[1]), (_single(b, m), _single(b, n)))
    for place, value in zip(places, made, strict=True):
        b.store(b.extract_element(value, I32(0)), place)


@functools.cache
def fold(dtype: str) -> Any:
    """An intrinsic ``(x, count, shift, sum)``: add all ``e**(x - shift)`` to the pair at ``sum``."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def fold_row(_context: Any, _x: Any, _count: Any, _shift: Any, _sum: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, count, shift, place = values
            shift = own.every(b, shift)
            held = [cgutils.alloca_once(b, shift.type) for _ in range(2)]
            b.store(own.all(0.0), held[0])
            b.store(own.all(-2.0 * own.numbers.most), held[1])

            def body(some: Any) -> None:
                made = own.add(b, (b.load(held[0]), b.load(held[1])), own.pair(b, b.fsub(some, shift)))
                b.store(made[0], held[0])
                b.store(made[1], held[1])

            walk(b, count, [Row(b, x, dtype)], body)
            sums = own.folded(b, [b.load(one) for one in held], lambda p, q: own.add(b, tuple(p), tuple(q)))
            _add_at(b, own, place, *sums)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, kind, nt.int64), codegen

    return fold_row


@functools.cache
def join(dtype: str) -> Any:
    """An intrinsic ``(sum, pair)``: add a pair to another, by their addresses."""
    own = lanes(dtype)

    @intrinsic
    def join_pairs(_context: Any, _sum: Any, _pair: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            _add_at(b, own, values[0], *(b.load(place) for place in _pair_at(b, own, values[1])))
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64), codegen

    return join_pairs


@functools.cache
def largest(dtype: str) -> Any:
    """An intrinsic ``(x, count)``: the largest element; nan if one is."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def largest_entry(_context: Any, _x: Any, _count: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, count = values
            held = cgutils.alloca_once_value(b, own.all(float("-inf")))

            def larger(one: Any, other: Any) -> Any:
                top = b.select(b.fcmp_ordered(">", one, other), one, other)  # the second one, if one is nan
                return b.select(b.fcmp_unordered("uno", one, one), one, top)

            walk(b, count, [Row(b, x, dtype)], lambda some: b.store(larger(b.load(held), some), held))
            return own.folded(b, [b.load(held)], lambda p, q: [larger(p[0], q[0])])[0]

        return kind(nt.int64, nt.int64), codegen

    return largest_entry


@functools.cache
def write(dtype: str, past_the_caches: bool = False) -> Any:
    """An intrinsic ``(x, y, count, shift, scale, n)``: ``y = e**(x - shift) scale 2**-n``."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def write_row(_context: Any, _x: Any, _y: Any, _count: Any, _shift: Any, _scale: Any, _n: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, y, count, *numbers = values
            shift, scale, n = (own.every(b, number) for number in numbers)
            walk(
                b,
                count,
                [Row(b, x, dtype)],
                lambda some: own.scaled(b, b.fsub(some, shift), scale, n),
                Row(b, y, dtype),
                past_the_caches,
            )
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, kind, kind, kind), codegen

    return write_row


@functools.cache
def exponentials(dtype: str, stores: bool) -> Any:
    """An intrinsic ``(x, y, count, shift)``: the sum of ``e**(x - shift)``, all up to 1; ``y`` gets them."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def sum_row(_context: Any, _x: Any, _y: Any, _count: Any, _shift: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, y, count, number = values
            shift, held = own.every(b, number), cgutils.alloca_once_value(b, own.all(0.0))

            def body(some: Any) -> Any:
                made = own.exponential(b, b.fsub(some, shift))
                b.store(b.fadd(b.load(held), made), held)
                return made

            walk(b, count, [Row(b, x, dtype)], body, Row(b, y, dtype) if stores else None)
            return own.folded(b, [b.load(held)], lambda p, q: [b.fadd(p[0], q[0])])[0]

        return kind(nt.int64, nt.int64, nt.int64, kind), codegen

    return sum_row


@functools.cache
def multiply(dtype: str) -> Any:
    """An intrinsic ``(y, count, factor)``: ``y = y factor``."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def multiply_row(_context: Any, _y: Any, _count: Any, _factor: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            y, count, number = values
            factor, row = own.every(b, number), Row(b, y, dtype)
            walk(b, count, [row], lambda some: b.fmul(some, factor), row)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, kind), codegen

    return multiply_row


@functools.cache
def entry(dtype: str) -> Any:
    """An intrinsic ``(x, shift, scale, n)``: what `write` makes of one number, as it is before rounding."""
    kind = math_of(dtype)[1]
    own = Lanes(dtype == "float64", 1)

    @intrinsic
    def one_entry(_context: Any, _x: Any, _shift: Any, _scale: Any, _n: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, shift, scale, n = (_single(b, value) for value in values)
            return b.extract_element(own.scaled(b, b.fsub(x, shift), scale, n), I32(0))

        return kind(kind, kind, kind, kind), codegen

    return one_entry


@functools.cache
def dot(dtype: str) -> Any:
    """An intrinsic ``(y, g, count)``: the sum of products; of what is behind a row's end none."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def dot_rows(_context: Any, _y: Any, _g: Any, _count: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
            y, g, count = values
            held = cgutils.alloca_once_value(b, own.all(0.0))

            def body(one: Any, other: Any) -> None:
                b.store(own.call(b, "fma", one, other, b.load(held)), held)

            walk(b, count, [Row(b, y, dtype), Row(b, g, dtype)], body, behind=0.0)
            return own.folded(b, [b.load(held)], lambda p, q: [b.fadd(p[0], q[0])])[0]

        return kind(nt.int64, nt.int64, nt.int64), codegen

    return dot_rows


@functools.cache
def back(dtype: str) -> Any:
    """An intrinsic ``(y, g, x, count, dot)``: ``x = y (g - dot)``, softmax's gradient."""
    own, kind = lanes(dtype), math_of(dtype)[1]

    @intrinsic
    def back_row(_context: Any, _y: Any, _g: Any, _x: Any, _count: Any, _dot: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            y, g, x, count, number = values
            less = own.every(b, number)
            rows = [Row(b, y, dtype), Row(b, g, dtype)]
            walk(b, count, rows, lambda p, q: b.fmul(p, b.fsub(q, less)), Row(b, x, dtype), behind=0.0)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, nt.int64, kind), codegen

    return back_row
