"""Loops over the elements of a pruned difference, compiled by Numba.

Not to be imported: `optx.delta._random_mask` runs its text, where there is Numba. Float16 and
float64 go through torch.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np

from optx.kernels.jit import njit, part

STEP = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
U1, U27, U30, U31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)
B0, B1, B15, B16 = np.uint32(0), np.uint32(1), np.uint32(0x7FFF), np.uint32(16)
QUIET = np.uint16(0x7FC0)


@part(inline="always")
def _kept(state, threshold):
    """SplitMix64's output for a state, against the share that is kept in units of 2**-63."""
    z = (state ^ (state >> U30)) * FIRST
    z = (z ^ (z >> U27)) * SECOND
    return ((z ^ (z >> U31)) >> U1) < threshold


@part(inline="always")
def _float32_of(bits):
    """The bits of a bfloat16 as float32."""
    return np.uint32(np.uint32(bits) << B16).view(np.float32)  # shifts give uint64


@part(inline="always")
def _narrow(x):
    """A float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint16((bits + B15 + ((bits >> B16) & B1)) >> B16)
    return rounded if x == x else QUIET


@njit(nogil=True, cache=True)
def keep(out, begin, key, threshold):
    """Which elements are kept."""
    start = key + begin * STEP
    for i in range(out.shape[0]):
        out[i] = _kept(start + np.uint64(i) * STEP, threshold)


@njit(nogil=True, cache=True)
def scale(x, begin, key, threshold, q):
    """In place: kept elements over q, the others 0."""
    start, zero = key + begin * STEP, x.dtype.type(0)
    for i in range(x.shape[0]):
        x[i] = x[i] / q if _kept(start + np.uint64(i) * STEP, threshold) else zero


@njit(nogil=True, cache=True)
def onto_f32(base, old, new, out, begin, key, threshold, q):
    """base + kept (new - old) / q; an unscaled change of the very base gives new itself.

    Equal numbers have no change: the difference of two infinities is none.
    """
    start, whole, none = key + begin * STEP, q == np.float32(1), np.float32(0)
    for i in range(out.shape[0]):
        change = (new[i] - old[i]) / q if new[i] != old[i] else none
        moved = new[i] if whole and base[i] == old[i] else base[i] + change
        out[i] = moved if _kept(start + np.uint64(i) * STEP, threshold) else base[i]


@njit(nogil=True, cache=True)
def onto_bf16(base, old, new, out, begin, key, threshold, q):
    """The same on the bits of bfloat16, with one rounding at the end."""
    start, whole, none = key + begin * STEP, q == np.float32(1), np.float32(0)
    for i in range(out.shape[0]):
        change = (_float32_of(new[i]) - _float32_of(old[i])) / q if new[i] != old[i] else none
        sum_ = _float32_of(base[i]) + change
        moved = new[i] if whole and base[i] == old[i] else _narrow(sum_)
        out[i] = moved if _kept(start + np.uint64(i) * STEP, threshold) else base[i]
