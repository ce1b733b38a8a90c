"""The loops of weights that are hashed block by block, on CPU, compiled by Numba for two dtypes.

Not to be imported: `optx.kernels.shared.cpu` runs copies of this file. A row of a block is a stretch of
consecutive slots.
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
from optx.kernels.shared.cpu import CHUNK, Args
from optx.kernels.shared.lanes import chosen, runs, zeroed

SHORT = "float32"
LONG = "float32"

F = np.float64 if SHORT == "float64" else np.float32  # pyright: ignore[reportUnnecessaryComparison]
read_run, add_run = runs(SHORT, LONG, False), runs(SHORT, LONG, True)
write = store(SHORT, 0)
KERNEL = types.void(types.voidptr)


@part(error_model="numpy", inline="always")
def slot(j, cols, tall, wide, key, starts):
    """The slot of weight j, and how many of its block's row there are from it on."""
    row, col = j // cols, j % cols
    block = (row // tall) * ((cols + wide - 1) // wide) + col // wide
    s = chosen(key, block, starts) + (row % tall) * wide + col % wide
    return s, min(wide - col % wide, cols - col)


@cfunc(KERNEL, error_model="numpy", cache=True)
def gather(pointer):
    """Weights chunk by chunk."""
    args = address(pointer)
    n, offset, m = get_i64(args, Args.NUMEL), get_i64(args, Args.OFFSET), get_i64(args, Args.SLOTS)
    key, signs = get_i64(args, Args.SLOTS_KEY), get_i64(args, Args.SIGNS_KEY)
    cols, tall, wide = get_i64(args, Args.COLS), get_i64(args, Args.TALL), get_i64(args, Args.WIDE)
    scale = F(get_f64(args, Args.SCALE))
    psi, weights = get_i64(args, Args.SHORT), get_i64(args, Args.LONG)
    while True:
        j = take(args) * CHUNK
        if j >= n:
            break
        end = min(j + CHUNK, n)
        while j < end:
            s, most = slot(j, cols, tall, wide, key, m - tall * wide + 1)
            count = min(most, end - j)
            read_run(psi, s, weights, j, offset + j, count, signs, scale, 1)
            j += count


@cfunc(KERNEL, error_model="numpy", cache=True)
def scatter(pointer):
    """Sums over the weights in their order, by the thread that comes first."""
    args = address(pointer)
    n, offset, m = get_i64(args, Args.NUMEL), get_i64(args, Args.OFFSET), get_i64(args, Args.SLOTS)
    key, signs = get_i64(args, Args.SLOTS_KEY), get_i64(args, Args.SIGNS_KEY)
    cols, tall, wide = get_i64(args, Args.COLS), get_i64(args, Args.TALL), get_i64(args, Args.WIDE)
    scale = F(get_f64(args, Args.SCALE))
    signed = get_i64(args, Args.SIGNED)
    sums, grads = get_i64(args, Args.SHORT), get_i64(args, Args.LONG)
    if take(args) == 0:
        zeroed(write, sums, 0, m, F(0))
        j = 0
        while j < n:
            s, most = slot(j, cols, tall, wide, key, m - tall * wide + 1)
            count = min(most, n - j)
            add_run(sums, s, grads, j, offset + j, count, signs, scale, signed)
            j += count
