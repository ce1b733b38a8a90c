"""RF8's bytes decoded sixteen at a time, as instructions for Numba.

On x86 a table of sixteen bytes is looked up by one instruction, which LLVM makes of the lookups written here
one by one. The lower four bits of a byte give the lower half of a bfloat16 and part of its upper half; the
exponent's other bits are added to that. Elsewhere the arithmetic of `optx.kernels.rf8.cpu.decode` is done on
vectors.
"""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import struct
from typing import Any

import numba.core.types as nt
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from optx.kernels.cpu import I8, I16, I32, I64, _typed, spread
from optx.kernels.rf8.layout import BIAS, MULTIPLIERS, STEPS

F32 = ir.FloatType()
LANES = 16
BLOCK = 64  # numbers that `dots` takes at a time


def _halves() -> tuple[list[int], list[int]]:
    """Of each lower half of a byte two bytes of its number, a bfloat16 in units of ``2**(e_max - 19)``."""
    found: list[int] = []
    for low in range(16):
        number = MULTIPLIERS[low & 7] * 2.0 ** (4 + (low >> 3))
        found.append(struct.unpack("I", struct.pack("f", number))[0] >> 16)
    return [_signed(bits & 255) for bits in found], [_signed(bits >> 8) for bits in found]


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


_LOWER, _UPPER = _halves()


def _many(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _all(value: int, kind: Any = I8) -> Any:
    return ir.Constant(_many(kind), [value] * LANES)


def _looked_up(b: Any, table: list[int], places: Any) -> Any:
    """A table's bytes at sixteen places, lane by lane: one instruction, once LLVM has seen them all."""
    held, found = ir.Constant(_many(I8), table), ir.Constant(_many(I8), ir.Undefined)
    for lane in range(LANES):
        place = b.zext(b.extract_element(places, I32(lane)), I32)
        found = b.insert_element(found, b.extract_element(held, place), I32(lane))
    return found


def whole_number(b: Any, code: Any, constant: Any) -> Any:
    """A code's number in units of ``2**(e_max - 19)``, an integer: of one, or of a vector.

    Args:
        b: the builder.
        code: of 32 bits.
        constant: makes such a constant.
    """
    shift = b.shl(b.and_(code, constant(7)), constant(2))
    steps = b.and_(b.lshr(constant(STEPS - (1 << 32)), shift), constant(15))
    exponent = b.and_(b.lshr(code, constant(3)), constant(15))
    size = b.shl(b.add(steps, constant(12)), exponent)
    size = b.select(b.icmp_signed("==", exponent, constant(0)), constant(0), size)
    return b.select(b.icmp_signed(">=", code, constant(128)), b.sub(constant(0), size), size)


def _codes(b: Any, address: Any) -> Any:
    codes = b.load(b.inttoptr(address, _many(I8).as_pointer()))
    codes.align = 1
    return codes


def _halves_of(b: Any, codes: Any) -> Any:
    """Sixteen codes' numbers as bfloat16, by their bits; of 0 others."""
    low = b.and_(codes, _all(15))
    upper = b.add(_looked_up(b, _UPPER, low), b.and_(b.lshr(codes, _all(4)), _all(7)))
    upper = b.or_(upper, b.and_(codes, _all(-128)))
    lower = b.zext(_looked_up(b, _LOWER, low), _many(I16))
    return b.or_(lower, b.shl(b.zext(upper, _many(I16)), _all(8, I16)))


def _is_zero(b: Any, codes: Any) -> Any:
    return b.icmp_unsigned("==", b.and_(codes, _all(0x78)), _all(0))


def _decoded(b: Any, address: Any) -> Any:
    """Sixteen numbers from the codes at an address."""
    codes = _codes(b, address)
    if "86" not in b.module.triple:
        whole = whole_number(b, b.zext(codes, _many(I32)), functools.partial(_all, kind=I32))
        return b.sitofp(whole, _many(F32))
    bits = b.shl(b.zext(_halves_of(b, codes), _many(I32)), _all(16, I32))
    return b.select(_is_zero(b, codes), _zeros(), b.bitcast(bits, _many(F32)))


def _decoded_halves(b: Any, address: Any, scale: Any) -> Any:
    """Sixteen numbers times a power of two, as the bits of bfloat16."""
    if "86" not in b.module.triple:
        made = b.fmul(_decoded(b, address), spread(b, scale, LANES))
        return b.trunc(b.lshr(b.bitcast(made, _many(I32)), _all(16, I32)), _many(I16))
    codes = _codes(b, address)
    exponents = b.sub(b.lshr(b.bitcast(scale, I32), I32(16)), I32(BIAS << 7))
    made = b.add(_halves_of(b, codes), spread(b, b.trunc(exponents, I16), LANES))
    return b.select(_is_zero(b, codes), _all(0, I16), made)


def _zeros() -> Any:
    return ir.Constant(_many(F32), [0.0] * LANES)


def unpacker(past_the_caches: bool, half: bool) -> Any:
    """An intrinsic ``(codes, to, scale)`` that writes sixteen numbers, times a scale.

    Args:
        past_the_caches: write them so that memory need not be read first; ``to`` is a multiple of 64 then.
        half: as bfloat16, none of which may be below its normal numbers; else as float32.
    """

    @_typed(nt.void, nt.int64, nt.int64, nt.float32)
    def unpack(b: Any, codes: Any, to: Any, scale: Any) -> None:
        made = (
            _decoded_halves(b, codes, scale) if half else b.fmul(_decoded(b, codes), spread(b, scale, LANES))
        )
        stored = b.store(made, b.inttoptr(to, made.type.as_pointer()))
        stored.align = (32 if half else 64) if past_the_caches else (2 if half else 4)
        if past_the_caches:
            stored.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    return unpack


@functools.cache
def dots(vectors: int) -> Any:
    """An intrinsic ``(codes, x, stride, sums, blocks)``: a row's products with a few vectors.

    Args:
        vectors: how many, 1 or 4.

    Its arguments are the addresses of the row, the first vector, and float32 sums that are written; how many
    bytes one vector is behind the other; and of how many BLOCKs of numbers.
    """

    @intrinsic
    def multiply(_context: Any, _codes: Any, _x: Any, _stride: Any, _sums: Any, _blocks: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            _dots(builder, vectors, *values)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, nt.int64, nt.int64), codegen

    return multiply


def _dots(b: Any, vectors: int, codes: Any, x: Any, stride: Any, sums: Any, blocks: Any) -> None:
    lines = 4 // vectors  # sums of each vector that don't wait for one another
    totals = [[cgutils.alloca_once_value(b, _zeros()) for _ in range(lines)] for _ in range(vectors)]
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        begin = b.mul(loop.index, I64(BLOCK))
        for part in range(BLOCK // LANES):
            at = b.add(begin, I64(LANES * part))
            w = _decoded(b, b.add(codes, at))
            for v, total in enumerate(totals):
                place = b.add(b.add(x, b.mul(stride, I64(v))), b.mul(at, I64(4)))
                some = b.load(b.inttoptr(place, _many(F32).as_pointer()))
                some.align = 4
                own, fused = total[part % lines], ("contract",)
                b.store(b.fadd(b.load(own), b.fmul(some, w, flags=fused), flags=fused), own)
    for v, total in enumerate(totals):
        whole = functools.reduce(b.fadd, [b.load(own) for own in total])
        added = functools.reduce(
            lambda one, other: b.fadd(one, other, flags=("reassoc",)),
            [b.extract_element(whole, I32(lane)) for lane in range(LANES)],
        )
        b.store(added, b.inttoptr(b.add(sums, I64(4 * v)), F32.as_pointer()))
