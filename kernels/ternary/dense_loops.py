"""Dense tensors from ternary masks on CPU: the loops, compiled by Numba for one dtype of the tensor.

Not to be imported: `optx.kernels.ternary.cpu` runs copies of this file, one per dtype, that differ in the
value of DTYPE, since the compiler's disk cache is kept by file. Elements are written through raw addresses
(`optx.kernels.cpu`).
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_f64, get_i64, load, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.ternary.cpu import Dense, array

DTYPE = "float32"

F = np.float64 if DTYPE == "float64" else np.float32  # pyright: ignore[reportUnnecessaryComparison]
ZERO = F(0)
NONE = np.int32(0)  # no random bits: round to nearest
read, write = load(DTYPE, 0), store(DTYPE, 1)


@part(error_model="numpy", inline="always")
def _term(plus, minus, bit, scale):
    """scale, -scale or 0. Words of 32 bits: as many lanes as there are of float32."""
    chosen = np.uint32(1) << np.uint32(bit)
    return (scale if plus & chosen else ZERO) - (scale if minus & chosen else ZERO)


@part(error_model="numpy")
def _add_word(to, at, count, plus, minus, scale):
    for bit in range(count):
        write(to, at + bit, read(to, at + bit) + _term(plus, minus, bit, scale), NONE)


@part(error_model="numpy")
def _fill_word(to, at, count, plus, minus, scale):
    for bit in range(count):
        write(to, at + bit, _term(plus, minus, bit, scale), NONE)


@part(error_model="numpy")
def _arguments(args):
    """Numbers, words of a turn, the tensor's address, the scale, words in all, and both masks."""
    n, words = get_i64(args, Dense.NUMEL), (get_i64(args, Dense.NUMEL) + 31) // 32
    plus = array(get_i64(args, Dense.PLUS), words, np.uint32)
    minus = array(get_i64(args, Dense.MINUS), words, np.uint32)
    return (
        n,
        get_i64(args, Dense.STEP),
        get_i64(args, Dense.TO),
        F(get_f64(args, Dense.SCALE)),
        words,
        plus,
        minus,
    )


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def add(pointer):
    """Every element plus its term, chunk by chunk."""
    args = address(pointer)
    n, step, to, scale, words, plus, minus = _arguments(args)
    while True:
        start = take(args) * step
        if start >= words:
            break
        for word in range(start, min(start + step, words)):
            if 32 * word + 32 <= n:  # a count known to the compiler: no loop is left
                _add_word(to, 32 * word, 32, plus[word], minus[word], scale)
            else:
                _add_word(to, 32 * word, n - 32 * word, plus[word], minus[word], scale)


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def fill(pointer):
    """Every element set to its term."""
    args = address(pointer)
    n, step, to, scale, words, plus, minus = _arguments(args)
    while True:
        start = take(args) * step
        if start >= words:
            break
        for word in range(start, min(start + step, words)):
            if 32 * word + 32 <= n:
                _fill_word(to, 32 * word, 32, plus[word], minus[word], scale)
            else:
                _fill_word(to, 32 * word, n - 32 * word, plus[word], minus[word], scale)
