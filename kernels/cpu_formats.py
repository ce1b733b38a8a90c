"""Moments of 8 bits and weights in two parts, as a compiled CPU kernel reads and writes them.

A moment is kept as one code per element and a scale per `GROUP` elements (`optx.step.formats` has the
arithmetic in words, and on tensors). A run's codes are decoded into float32 in a room on the stack, which the
loop over elements reads and writes like any array, and encoded again from there: a group's codes can only
be written once its largest element is known. Both are written as vectors of a whole group; LLVM takes them
apart into what the processor has.
"""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numba.core.types as nt
from llvmlite import ir
from numba.core import cgutils

from optx.kernels.cpu import I8, I16, I32, I64, RUN, _at, _tag, _typed
from optx.kernels.generated import source

GROUP = 32  # elements that share a scale
F32 = ir.FloatType()
# A number of at most 22 bits plus this has its nearest integer in its lowest bits, ties to even.
_ROUND = 12582912.0
# A group's largest magnitude, by its bits: below, the group is stored as zeros; from there on, as nan.
_SMALLEST, _LARGEST = 0x00800000, 0x7E800000  # 2**-126, 2**126


def _many(kind: Any) -> Any:
    return ir.VectorType(kind, GROUP)


def _all(value: float, kind: Any = F32) -> ir.Constant:
    return ir.Constant(_many(kind), [value] * GROUP)


def _spread(b: Any, value: Any) -> Any:
    """One number in every lane."""
    one = b.insert_element(ir.Constant(_many(value.type), ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(_many(value.type), ir.Undefined), _all(0, I32))


def _intrinsic(b: Any, name: str, result: Any, *values: Any) -> Any:
    kind = ir.FunctionType(result, [v.type for v in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def _magnitude(b: Any, x: Any) -> Any:
    """The bits of an absolute value, which order as the numbers do, with nan above all."""
    return b.and_(b.bitcast(x, _many(I32)), _all(0x7FFFFFFF, I32))


def _group(b: Any, address: Any, kind: Any, role: int, value: Any = None) -> Any:
    """Load or store the elements of a group."""
    pointer = b.inttoptr(address, _many(kind).as_pointer())
    done = _tag(b, b.load(pointer) if value is None else b.store(value, pointer), role)
    done.align = 4 if kind is F32 else 1
    return done


@functools.cache
def room(size: int) -> Any:
    """An intrinsic that gives so many bytes of the function's own; its argument is not looked at."""

    @_typed(nt.int64, nt.int64)
    def allocate(b: Any, _size: Any) -> Any:
        made = cgutils.alloca_once(b, ir.ArrayType(I8, size))
        made.align = 64
        return b.ptrtoint(made, I64)

    return allocate


ROOM = 4 * RUN  # bytes of a run in float32


@functools.cache
def decode_group(dtype: str, role: int, codes_role: int) -> Any:
    """An intrinsic ``(codes, scale, room)``: a group in float32."""

    @_typed(nt.void, nt.int64, nt.int64, nt.int64)
    def decode(b: Any, codes: Any, scale: Any, room: Any) -> None:
        kept = _group(b, codes, I8, codes_role)
        half = _tag(b, b.load(b.inttoptr(scale, I16.as_pointer())), codes_role)
        half.align = 2
        s = b.bitcast(b.shl(b.zext(half, I32), I32(16)), F32)
        _group(b, room, F32, role, _decoded(b, dtype, kept, s))

    return decode


def _decoded(b: Any, dtype: str, codes: Any, scale: Any) -> Any:
    if dtype == "nonnegative8":
        root = b.fmul(b.uitofp(codes, _many(F32)), _spread(b, b.fmul(scale, ir.Constant(F32, 1 / 255))))
        return b.fmul(root, root)
    q = b.sitofp(codes, _many(F32))
    size = b.bitcast(_magnitude(b, q), _many(F32))
    over = _reciprocal(b, b.fsub(_all(2.0), b.fmul(size, _all(1 / 127))))
    return b.fmul(b.fmul(q, over), _spread(b, b.fmul(scale, ir.Constant(F32, 1 / 127))))


# Of a polynomial that is 1 / u for u from 1 to 2 up to 0.0017, see `optx.step.formats.reciprocal`.
_INVERSE = (2.82842288, -2.93934142, 1.33102253, -0.22183709)


def _reciprocal(b: Any, u: Any) -> Any:
    """1 / u, to 3e-6, for u from 1 to 2: a division takes as long as all that an element needs besides."""
    p = _all(_INVERSE[3])
    for factor in _INVERSE[2::-1]:
        p = b.fadd(b.fmul(p, u), _all(factor))
    return b.fmul(p, b.fsub(_all(2.0), b.fmul(u, p)))


@functools.cache
def encode_group(dtype: str, role: int, codes_role: int, keep: bool) -> Any:
    """An intrinsic ``(room, codes, scale, draw)``: stores a group from a room, of second moments from roots.

    ``draw`` has 32 random bits, which serve all of a group: each lane adds a number of its own to them, so
    that they are spread evenly.

    Args:
        dtype: ``signed8`` or ``nonnegative8``.
        role: the alias scope of the room.
        codes_role: that of codes and scales.
        keep: leave in the room what was stored, decoded.
    """

    @_typed(nt.void, nt.int64, nt.int64, nt.int64, nt.int32)
    def encode(b: Any, room: Any, codes: Any, scales: Any, draw: Any) -> None:
        x = _group(b, room, F32, role)
        size = _magnitude(b, x)
        largest = _intrinsic(b, f"llvm.vector.reduce.smax.v{GROUP}i32", I32, size)
        scale, plain = _scale(b, largest)
        half = b.trunc(b.lshr(b.bitcast(scale, I32), I32(16)), I16)
        stored = _tag(b, b.store(half, b.inttoptr(scales, I16.as_pointer())), codes_role)
        stored.align = 2
        safe = b.select(plain, scale, ir.Constant(F32, 1.0))
        if dtype == "signed8":
            y = b.fmul(x, _spread(b, b.fdiv(ir.Constant(F32, 1.0), safe)))
            size = b.bitcast(_magnitude(b, y), _many(F32))
            level = b.fmul(b.fmul(y, _reciprocal(b, b.fadd(_all(1.0), size))), _all(254.0))
            level = b.fadd(level, _dither(b, draw))
        else:
            level = b.fmul(x, _spread(b, b.fdiv(ir.Constant(F32, 255.0), safe)))
            level = b.fadd(level, _dither(b, draw))
            # What is not 0 stays so: an update is divided by it.
            least = b.select(b.fcmp_ordered(">", x, _all(0.0)), _all(1.0), _all(0.0))
            level = b.select(b.fcmp_ordered(">", level, least), level, least)
        bits = b.bitcast(b.fadd(level, _all(_ROUND)), _many(I32))
        bits = b.and_(bits, _spread(b, b.select(plain, I32(0xFF), I32(0))))
        kept = b.trunc(bits, _many(I8))
        _group(b, codes, I8, codes_role, kept)
        if keep:
            _group(b, room, F32, role, _decoded(b, dtype, kept, scale))

    return encode


_GOLDEN = 0x9E3779B9
_LANES = [(i * _GOLDEN + (1 << 31)) % (1 << 32) - (1 << 31) for i in range(GROUP)]


def _dither(b: Any, draw: Any) -> Any:
    """A number between -1/2 and 1/2 for each lane, each of them as likely as any.

    Not the very ends, which could make 128 of 127.
    """
    drawn = b.add(_spread(b, draw), ir.Constant(_many(I32), _LANES))
    return b.fmul(b.sitofp(drawn, _many(F32)), _all(2.0**-32 * (1 - 2.0**-11)))


def _scale(b: Any, largest: Any) -> tuple[Any, Any]:
    """A group's scale from the bits of its largest magnitude, and whether it is plain: neither 0 nor nan."""
    above = b.and_(b.add(largest, I32(0xFFFF)), I32(0xFFFF0000 - (1 << 32)))
    low = b.icmp_signed("<", largest, I32(_SMALLEST))
    high = b.icmp_signed(">=", largest, I32(_LARGEST))
    bits = b.select(low, I32(0), b.select(high, I32(0x7FC00000), above))
    return b.bitcast(bits, F32), b.not_(b.or_(low, high))


@_typed(nt.int32, nt.int64, nt.int64)
def get_code(b: Any, codes: Any, index: Any) -> Any:
    """One code."""
    return b.zext(b.load(_at(b, codes, index, I8)), I32)


@_typed(nt.void, nt.int64, nt.int64, nt.int32)
def put_code(b: Any, codes: Any, index: Any, code: Any) -> None:
    """Write one."""
    b.store(b.trunc(code, I8), _at(b, codes, index, I8))


@_typed(nt.void, nt.int64, nt.int64)
def put_zero(b: Any, room: Any, index: Any) -> None:
    """Write a float32 zero."""
    b.store(ir.Constant(F32, 0.0), _at(b, room, index, F32))


# ---- weights in two parts ---------------------------------------------------------------------------

_REST = {"split8": I8, "split16": I16}


@functools.cache
def load_split(rounding: str, role: int, rest_role: int) -> Any:
    """An intrinsic ``(weights, rests, index)``: the float32 that a bfloat16 weight and its rest are."""
    kind = _REST[rounding]

    @_typed(nt.float32, nt.int64, nt.int64, nt.int64)
    def load(b: Any, weights: Any, rests: Any, index: Any) -> Any:
        half = _tag(b, b.load(_at(b, weights, index, I16)), role)
        rest = _tag(b, b.load(_at(b, rests, index, kind)), rest_role)
        half.align, rest.align = 2, kind.width // 8
        bits = b.shl(b.zext(half, I32), I32(16))
        low = b.shl(b.sext(rest, I32), I32(16 - kind.width))
        # Of a weight that was set to 0 by others, a negative rest would leave a nan.
        size = b.add(b.and_(bits, I32(0x7FFFFFFF)), low)
        size = b.select(b.icmp_signed(">", size, I32(0)), size, I32(0))
        return b.bitcast(b.or_(b.and_(bits, I32(-(1 << 31))), size), F32)

    return load


@functools.cache
def store_split(rounding: str, role: int, rest_role: int) -> Any:
    """An intrinsic ``(weights, rests, index, value)``: the nearest bfloat16, and the rest."""
    kind = _REST[rounding]
    dropped = 16 - kind.width  # bits that neither part has

    @_typed(nt.void, nt.int64, nt.int64, nt.int64, nt.float32)
    def store(b: Any, weights: Any, rests: Any, index: Any, value: Any) -> None:
        bits = b.bitcast(value, I32)
        is_nan = b.icmp_unsigned(">", b.and_(bits, I32(0x7FFFFFFF)), I32(0x7F800000))
        bits = b.select(is_nan, I32(0x7FC00000), bits)
        if dropped:
            bits = b.and_(b.add(bits, I32(1 << (dropped - 1))), I32(-(1 << dropped)))
        half = b.lshr(b.add(bits, I32(0x8000)), I32(16))
        rest = b.ashr(b.sub(bits, b.shl(half, I32(16))), I32(dropped))
        first = _tag(b, b.store(b.trunc(half, I16), _at(b, weights, index, I16)), role)
        second = _tag(b, b.store(b.trunc(rest, kind), _at(b, rests, index, kind)), rest_role)
        first.align, second.align = 2, kind.width // 8

    return store


@functools.cache
def digest() -> str:
    """Changes when this file does: what is compiled of it is part of every kernel that imports it."""
    return hashlib.sha256(source("optx.kernels", "cpu_formats.py").encode()).hexdigest()[:12]
