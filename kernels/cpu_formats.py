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

from optx.kernels.cpu import I8, I16, I32, I64, _at, _tag, _typed, drawn, spread
from optx.kernels.generated import source

GROUP = 32  # elements that share a scale
# Elements that an update decodes, takes, encodes at a time, where it sums nothing: what a loop needs before
# it begins is a tenth of a run of 128.
LONG = 512
F32 = ir.FloatType()
# A group's largest magnitude, by its bits: below, the group is stored as zeros; from there on, as nan.
_SMALLEST, _LARGEST = 0x00800000, 0x7E800000  # 2**-126, 2**126


def _many(kind: Any) -> Any:
    return ir.VectorType(kind, GROUP)


def _all(value: float, kind: Any = F32) -> ir.Constant:
    return ir.Constant(_many(kind), [value] * GROUP)


def _spread(b: Any, value: Any) -> Any:
    """One number in every lane."""
    return spread(b, value, GROUP)


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


ROOM = 4 * LONG  # bytes of a run in float32


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


def _reciprocal(b: Any, u: Any, fused: bool = False) -> Any:
    """1 / u, to 3e-6, for u from 1 to 2: a division takes as long as all that an element needs besides."""
    p = _all(_INVERSE[3])
    for factor in _INVERSE[2::-1]:
        p = _fused(b, p, u, _all(factor)) if fused else b.fadd(b.fmul(p, u), _all(factor))
    if fused:
        return b.fmul(p, _fused(b, b.fneg(u), p, _all(2.0)))
    return b.fmul(p, b.fsub(_all(2.0), b.fmul(u, p)))


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the processor has such an instruction."""
    return _intrinsic(b, f"llvm.fmuladd.v{GROUP}f32", _many(F32), x, y, z)


# ---- encoding ---------------------------------------------------------------------------------------

# A run's groups are encoded in three steps: each one's largest magnitude is found; of all of them at once
# scales, their inverses, and draws are made; and a group at a time takes those. What is between the steps
# lies in a room beside that of the last, incomplete group's codes, at these bytes.
_GROUPS = LONG // GROUP
_TOPS = GROUP
_UNITS, _MASKS, _DRAWS, _HALVES = (_TOPS + 4 * _GROUPS * i for i in range(1, 5))
SPARE = _HALVES + 4 * _GROUPS
_OWN = 31  # the alias scope of that room


def _few(value: float, kind: Any = I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, _GROUPS), [value] * _GROUPS)


def _in_spare(b: Any, room: Any, at: int, kind: Any, value: Any = None) -> Any:
    """Load or store what lies in the room between the steps."""
    pointer = b.inttoptr(b.add(room, I64(at)), kind.as_pointer())
    done = _tag(b, b.load(pointer) if value is None else b.store(value, pointer), _OWN)
    done.align = 4
    return done


@functools.cache
def top_of_group(role: int) -> Any:
    """An intrinsic ``(room, spare)``: finds a group's largest magnitude."""

    @_typed(nt.void, nt.int64, nt.int64)
    def top(b: Any, room: Any, spare: Any) -> None:
        size = _magnitude(b, _group(b, room, F32, role))
        largest = _intrinsic(b, f"llvm.vector.reduce.smax.v{GROUP}i32", I32, size)
        _in_spare(b, spare, _TOPS, I32, largest)

    return top


# What the largest magnitude is in codes, and a little less: a draw that is nearly 1 must not make a code more
# of it, of signed numbers neither after the reciprocal's error.
_MOST = {"signed8": 1.0, "nonnegative8": 255 * (1 - 2.0**-20)}


@functools.cache
def scales_of_groups(dtype: str) -> Any:
    """An intrinsic ``(spare, start, key)``: of a run's groups, from their largest magnitudes, all at once."""

    @_typed(nt.void, nt.int64, nt.int64, nt.int64)
    def make(b: Any, spare: Any, start: Any, key: Any) -> None:
        kind = ir.VectorType(I32, _GROUPS)
        largest = _in_spare(b, spare, _TOPS, kind)
        above = b.and_(b.add(largest, _few(0xFFFF)), _few(0xFFFF0000 - (1 << 32)))
        low = b.icmp_signed("<", largest, _few(_SMALLEST))
        high = b.icmp_signed(">=", largest, _few(_LARGEST))
        odd = b.or_(low, high)  # neither is scaled: codes are 0
        bits = b.select(low, _few(0), b.select(high, _few(0x7FC00000), above))
        _in_spare(b, spare, _HALVES, kind, b.lshr(bits, _few(16)))
        floats = ir.VectorType(F32, _GROUPS)
        safe = b.select(odd, _few(1.0, F32), b.bitcast(bits, floats))
        _in_spare(b, spare, _UNITS, floats, b.fdiv(_few(_MOST[dtype], F32), safe))
        _in_spare(b, spare, _MASKS, kind, b.select(odd, _few(0), _few(0xFF)))
        first = spread(b, b.trunc(start, I32), _GROUPS)
        index = b.add(first, ir.Constant(kind, [GROUP * i for i in range(_GROUPS)]))
        _in_spare(b, spare, _DRAWS, kind, drawn(b, index, key, _few))

    return make


@functools.cache
def encode_group(dtype: str, role: int, codes_role: int, keep: bool) -> Any:
    """An intrinsic ``(room, codes, scale, spare)``: stores a group from a room, of second moments from roots.

    A draw of 32 random bits serves all of a group: each lane adds a number of its own to them, so that they
    are spread evenly. Its upper bits are written after the point of a float from 256 to 512, to which the
    number in codes is added: the bits before the point are the code.

    Args:
        dtype: ``signed8`` or ``nonnegative8``.
        role: the alias scope of the room.
        codes_role: that of codes and scales.
        keep: leave in the room what was stored, decoded.
    """

    @_typed(nt.void, nt.int64, nt.int64, nt.int64, nt.int64)
    def encode(b: Any, room: Any, codes: Any, scales: Any, spare: Any) -> None:
        x = _group(b, room, F32, role)
        half = b.trunc(_in_spare(b, spare, _HALVES, I32), I16)
        stored = _tag(b, b.store(half, b.inttoptr(scales, I16.as_pointer())), codes_role)
        stored.align = 2
        y = b.fmul(x, _spread(b, _in_spare(b, spare, _UNITS, F32)))
        draws = b.add(_spread(b, _in_spare(b, spare, _DRAWS, I32)), ir.Constant(_many(I32), _LANES))
        draws = b.lshr(draws, _all(17, I32))
        mask = _spread(b, _in_spare(b, spare, _MASKS, I32))
        if dtype == "signed8":
            # 128 more than it is, so that it is above 0.
            dither = b.bitcast(b.or_(draws, _all(_bits_of_whole(384), I32)), _many(F32))
            size = b.bitcast(_magnitude(b, y), _many(F32))
            level = b.fmul(y, _reciprocal(b, b.fadd(_all(1.0), size), fused=True))
            level = _fused(b, level, _all(254 * (1 - 2.0**-17)), dither)
            code = b.lshr(b.bitcast(level, _many(I32)), _all(15, I32))
            code = b.xor(code, _all(0x80, I32))
        else:
            dither = b.bitcast(b.or_(draws, _all(_bits_of_whole(256), I32)), _many(F32))
            code = b.lshr(b.bitcast(b.fadd(y, dither), _many(I32)), _all(15, I32))
            # What is not 0 stays so: an update is divided by it.
            one = (_bits_of_whole(257)) >> 15
            bits = b.bitcast(x, _many(I32))
            least = b.select(b.icmp_signed("<", bits, _all(one, I32)), bits, _all(one, I32))
            code = b.select(b.icmp_signed(">", code, least), code, least)
        kept = b.trunc(b.and_(code, mask), _many(I8))
        _group(b, codes, I8, codes_role, kept)
        if keep:
            scale = b.bitcast(b.shl(b.zext(half, I32), I32(16)), F32)
            _group(b, room, F32, role, _decoded(b, dtype, kept, scale))

    return encode


def _bits_of_whole(number: int) -> int:
    """The bits of a float32 from 256 to 511, whose integer begins at bit 15."""
    return (135 << 23) + ((number - 256) << 15)


_GOLDEN = 0x9E3779B9
_LANES = [(i * _GOLDEN + (1 << 31)) % (1 << 32) - (1 << 31) for i in range(GROUP)]


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
