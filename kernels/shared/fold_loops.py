"""The loops of folded weights on CPU, compiled by Numba for the dtypes of the array and of the weights.

Not to be imported: `optx.kernels.shared.cpu` runs copies of this file. Segment q of the long vector, m
weights, is the array rotated by ``start(q)``: two stretches of consecutive slots.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_f64, get_i64, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.shared.cpu import CHUNK, SPAN, Args
from optx.kernels.shared.lanes import chosen, runs, zeroed

SHORT = "float32"
LONG = "float32"

F = np.float64 if SHORT == "float64" else np.float32  # pyright: ignore[reportUnnecessaryComparison]
read_run, add_run = runs(SHORT, LONG, False), runs(SHORT, LONG, True)
write = store(SHORT, 0)
KERNEL = types.void(types.voidptr)


@cfunc(KERNEL, error_model="numpy", cache=True)
def gather(pointer):
    """Weights chunk by chunk."""
    args = address(pointer)
    n, offset, m = get_i64(args, Args.NUMEL), get_i64(args, Args.OFFSET), get_i64(args, Args.SLOTS)
    key, signs = get_i64(args, Args.SLOTS_KEY), get_i64(args, Args.SIGNS_KEY)
    scale = F(get_f64(args, Args.SCALE))
    psi, weights = get_i64(args, Args.SHORT), get_i64(args, Args.LONG)
    while True:
        j = take(args) * CHUNK
        if j >= n:
            break
        end = min(j + CHUNK, n)
        while j < end:
            i = offset + j
            q = i // m
            s = chosen(key, q, m) + i - q * m
            if s >= m:
                s -= m
            count = min(end - j, min((q + 1) * m - i, m - s))
            read_run(psi, s, weights, j, i, count, signs, scale, 1)
            j += count


@part(error_model="numpy")
def stretch(sums, grads, first, last, shift, begin, finish, offset, signs, scale, signed):
    """Slots from ``first`` to before ``last``: slot s has weight s + shift, if the module has that one."""
    low, high = max(first, begin - shift), min(last, finish - shift)
    if low < high:
        i = low + shift
        add_run(sums, low, grads, i - offset, i, high - low, signs, scale, signed)


@cfunc(KERNEL, error_model="numpy", cache=True)
def scatter(pointer):
    """Sums slot by slot, each over the segments in their order."""
    args = address(pointer)
    n, offset, m = get_i64(args, Args.NUMEL), get_i64(args, Args.OFFSET), get_i64(args, Args.SLOTS)
    key, signs = get_i64(args, Args.SLOTS_KEY), get_i64(args, Args.SIGNS_KEY)
    scale = F(get_f64(args, Args.SCALE))
    signed = get_i64(args, Args.SIGNED)
    sums, grads = get_i64(args, Args.SHORT), get_i64(args, Args.LONG)
    end = offset + n
    while True:
        first = take(args) * SPAN
        if first >= m:
            break
        last = min(first + SPAN, m)
        zeroed(write, sums, first, last, F(0))
        for q in range(offset // m, (end + m - 1) // m):
            start = chosen(key, q, m)
            begin, finish = max(offset, q * m), min(end, (q + 1) * m)
            stretch(
                *(sums, grads, max(first, start), last, q * m - start, begin, finish),
                *(offset, signs, scale, signed),
            )
            stretch(
                *(sums, grads, first, min(last, start), q * m - start + m, begin, finish),
                *(offset, signs, scale, signed),
            )
