"""RF8's bytes on CPU: the loops, compiled by Numba for one dtype of the numbers.

Not to be imported: `optx.kernels.rf8.cpu` runs copies of this file, one per dtype, that differ in the value
of DTYPE, since the compiler's disk cache is kept by file.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportUnnecessaryComparison=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_i64, load, put_number, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.rf8.cpu import (
    CHUNK,
    Codes,
    decode,
    encode,
    first_number,
    half_of_least,
    larger,
    lift,
    lifted,
    magnitude_bits,
    put_code,
    rounded,
    unit,
    within,
)
from optx.kernels.rf8.vectors import LANES, unpacker

DTYPE = "float32"

KERNEL = types.void(types.voidptr)
NONE = np.int32(0)  # no random bits: round to nearest
HALF, BRAIN = DTYPE == "float16", DTYPE == "bfloat16"
SIZE = 2 if BRAIN else 4
unpack_near, unpack_far = unpacker(False, BRAIN), unpacker(True, BRAIN)
LEAST = -100 if BRAIN else -128  # of e_max, from which on no number is below the dtype's normal ones
FAR = 1 << 23  # numbers that no cache holds
# The largest number that the dtype has, and the bits of the largest of RF8's in it.
MOST = np.float32(65504.0 if HALF else 3.4028234663852886e38)
MOST_BITS = np.int32(0x47700000 if HALF else 0x7F700000)
read, write = load(DTYPE, 0), store(DTYPE, 1)
put_i64 = put_number("int64")


@cfunc(KERNEL, error_model="numpy", cache=True)
def largest(pointer):
    """The bits of each chunk's largest magnitude."""
    args = address(pointer)
    n, values, found = get_i64(args, Codes.NUMEL), get_i64(args, Codes.VALUES), get_i64(args, Codes.LARGEST)
    while True:
        chunk = take(args)
        if chunk * CHUNK >= n:
            break
        most = np.int32(0)
        for i in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, n)):
            most = larger(most, magnitude_bits(read(values, i)))
        put_i64(found + 8 * chunk, float(most))


@cfunc(KERNEL, error_model="numpy", cache=True)
def pack(pointer):
    """Numbers to bytes."""
    args = address(pointer)
    n, values, codes = get_i64(args, Codes.NUMEL), get_i64(args, Codes.VALUES), get_i64(args, Codes.CODES)
    e_max = get_i64(args, Codes.E_MAX)
    within_range = lifted(e_max)
    first, half, factor = first_number(within_range), half_of_least(within_range), lift(e_max, within_range)
    while True:
        start = take(args) * CHUNK
        if start >= n:
            break
        for i in range(start, min(start + CHUNK, n)):
            put_code(codes, i, encode(read(values, i) * factor, first, half))


@part(error_model="numpy", inline="always")
def unpack_some(values, codes, begin, end, scale):
    """Numbers one by one, which LLVM makes vectors of."""
    for i in range(begin, end):
        value = decode(codes, i) * scale
        write(values, i, within(value, MOST) if HALF else value, NONE)


@cfunc(KERNEL, error_model="numpy", cache=True)
def unpack(pointer):
    """Bytes to numbers; what is too large for the dtype becomes its largest."""
    args = address(pointer)
    n, values, codes = get_i64(args, Codes.NUMEL), get_i64(args, Codes.VALUES), get_i64(args, Codes.CODES)
    e_max = get_i64(args, Codes.E_MAX)
    scale, far, exact = unit(e_max), n >= FAR and values % 64 == 0, e_max >= LEAST
    while True:
        start = take(args) * CHUNK
        if start >= n:
            break
        stop = min(start + CHUNK, n)
        if exact and not HALF:
            whole = start + (stop - start) // LANES * LANES
            if far:
                for i in range(start, whole, LANES):
                    unpack_far(codes + i, values + SIZE * i, scale)
            else:
                for i in range(start, whole, LANES):
                    unpack_near(codes + i, values + SIZE * i, scale)
            start = whole
        unpack_some(values, codes, start, stop, scale)


@cfunc(KERNEL, error_model="numpy", cache=True)
def quantise(pointer):
    """Numbers to those that RF8 has, with any exponent."""
    args = address(pointer)
    n, values, to = get_i64(args, Codes.NUMEL), get_i64(args, Codes.VALUES), get_i64(args, Codes.CODES)
    while True:
        start = take(args) * CHUNK
        if start >= n:
            break
        for i in range(start, min(start + CHUNK, n)):
            write(to, i, rounded(read(values, i), MOST_BITS), NONE)
