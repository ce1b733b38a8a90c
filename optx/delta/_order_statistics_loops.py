"""Counting float32 numbers by their bits, compiled by Numba.

Not to be imported: `optx.delta._order_statistics` runs its text, where there is Numba.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import numpy as np

from optx.kernels.jit import njit

SIGN, HIGH, LOW = np.int32(31), np.int32(16), np.int32(0xFFFF)
POSITIVE, HALF = np.int32(0x7FFFFFFF), np.int32(1 << 15)


@njit(inline="always")
def _key(bits):
    """An integer in the order of the numbers: negative ones are turned round."""
    return bits ^ ((bits >> SIGN) & POSITIVE)


@njit(cache=True, nogil=True)
def count_high(bits, counts):
    """How many numbers have each of the upper 16 bits."""
    for i in range(bits.size):
        counts[(_key(bits[i]) >> HIGH) + HALF] += 1


@njit(cache=True, nogil=True)
def count_low(bits, bucket, counts):
    """How many of those in one bucket have each of the lower 16."""
    for i in range(bits.size):
        key = _key(bits[i])
        if (key >> HIGH) + HALF == bucket:
            counts[key & LOW] += 1
