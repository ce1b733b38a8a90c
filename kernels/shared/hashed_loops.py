"""The loops of weights that are hashed one by one, on CPU, compiled by Numba for two dtypes.

Not to be imported: `optx.kernels.shared.cpu` runs copies of this file.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_f64, get_i64, load, mix, store, take
from optx.kernels.jit import cfunc
from optx.kernels.shared.cpu import CHUNK, Args
from optx.kernels.shared.lanes import NONE, chosen, flipped, zeroed

SHORT = "float32"
LONG = "float32"

F = np.float64 if SHORT == "float64" else np.float32  # pyright: ignore[reportUnnecessaryComparison]
read_short, write_short = load(SHORT, 0), store(SHORT, 0)
read_long, write_long = load(LONG, 1), store(LONG, 1)
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
        first = take(args) * CHUNK
        if first >= n:
            break
        for j in range(first, min(first + CHUNK, n)):
            i = offset + j
            value = read_short(psi, chosen(key, i, m)) * scale
            write_long(weights, j, flipped(value, np.uint32(mix(signs, i >> 6) >> (i & 63)), 0), NONE)


@cfunc(KERNEL, error_model="numpy", cache=True)
def scatter(pointer):
    """Sums over the weights in their order, by the thread that comes first."""
    args = address(pointer)
    n, offset, m = get_i64(args, Args.NUMEL), get_i64(args, Args.OFFSET), get_i64(args, Args.SLOTS)
    key, signs = get_i64(args, Args.SLOTS_KEY), get_i64(args, Args.SIGNS_KEY)
    scale = F(get_f64(args, Args.SCALE))
    signed = get_i64(args, Args.SIGNED)
    sums, grads = get_i64(args, Args.SHORT), get_i64(args, Args.LONG)
    if take(args) == 0:
        zeroed(write_short, sums, 0, m, F(0))
        for j in range(n):
            i = offset + j
            s = chosen(key, i, m)
            term = flipped(
                F(read_long(grads, j)) * scale, np.uint32((mix(signs, i >> 6) >> (i & 63)) * signed), 0
            )
            write_short(sums, s, read_short(sums, s) + term, NONE)
