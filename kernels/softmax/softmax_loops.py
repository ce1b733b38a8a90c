"""Softmax in two passes on CPU: the loops over rows and pieces of rows, compiled by Numba for one dtype.

Not to be imported: `optx.kernels.softmax.cpu` runs its text once per dtype, with another value of DTYPE,
since what is compiled is kept by the text.

A long row is summed piece by piece, whoever takes the pieces: neither the number of threads nor that of rows
shows in a result.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import ITEMSIZE, address, get_i64, load, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.softmax import operations
from optx.kernels.softmax.cpu import PIECE, Args, What
from optx.kernels.softmax.layout import FIELDS, FLOAT32, FLOAT64

DTYPE = "float32"
MATH, _ = operations.math_of(DTYPE)
F = np.float64 if MATH == "float64" else np.float32
SIZE, WIDTH = ITEMSIZE[DTYPE], ITEMSIZE[MATH]
IS_HALF: bool = DTYPE.endswith("16")
MOST = F((FLOAT64 if MATH == "float64" else FLOAT32).most)
NONE = np.int32(0)  # no random bits: round to nearest
ZERO, ONE, FIRST = F(0), F(1), F(-2) * MOST

load_x, load_f = load(DTYPE, 0), load(MATH, 1)
store_y, store_f = store(DTYPE, 2), store(MATH, 1)
fold, join, write, entry, write_past = (
    operations.fold(DTYPE),
    operations.join(DTYPE),
    operations.write(DTYPE),
    operations.entry(DTYPE),
    operations.write(DTYPE, past_the_caches=True),
)
exponentials, multiply = operations.exponentials(DTYPE, stores=True), operations.multiply(DTYPE)
largest, dot, back = operations.largest(DTYPE), operations.dot(DTYPE), operations.back(DTYPE)

_scalar = part(error_model="numpy")


@_scalar
def _x(args, row):
    return get_i64(args, Args.X) + row * get_i64(args, Args.STRIDE) * SIZE


@_scalar
def _y(args, row):
    return get_i64(args, Args.Y) + row * get_i64(args, Args.COUNT) * SIZE


@_scalar
def _sum(args, row):
    """Where a row's sum is."""
    return get_i64(args, Args.SUMS) + row * FIELDS * WIDTH


@_scalar
def _start(place):
    store_f(place, 0, ZERO, NONE)
    store_f(place, 1, FIRST, NONE)


@_scalar
def _fold_whole(x, n, shift, place):
    _start(place)
    for begin in range(0, n, PIECE):
        fold(x + begin * SIZE, min(PIECE, n - begin), shift, place)
    store_f(place, 2, shift, NONE)


@_scalar
def _again(x, n, place):
    """A row beyond the range: its largest entry is subtracted first."""
    exponent = load_f(place, 1)
    if not (-MOST <= exponent <= MOST):
        _fold_whole(x, n, largest(x, n), place)


@_scalar
def _write(args, row, begin, n):
    """A piece of a row: scale p, and at its label the number that is taken off."""
    place, scales, labels = _sum(args, row), get_i64(args, Args.SCALES), get_i64(args, Args.LABELS)
    x, y = _x(args, row), _y(args, row)
    m, exponent, shift = load_f(place, 0), load_f(place, 1), load_f(place, 2)
    scale = ONE
    if scales != 0:
        scale = load_f(scales, row)
        if scale == ZERO:  # the row is not looked at: it may be anything
            for k in range(begin, begin + n):
                store_y(y, k, ZERO, NONE)
            return
    scale /= m
    if get_i64(args, Args.PAST) != 0:
        write_past(x + begin * SIZE, y + begin * SIZE, n, shift, scale, exponent)
    else:
        write(x + begin * SIZE, y + begin * SIZE, n, shift, scale, exponent)
    if labels != 0:
        label = get_i64(labels, row)
        if begin <= label < begin + n:
            own = entry(F(load_x(x, label)), shift, scale, exponent)
            store_y(y, label, own - load_f(get_i64(args, Args.LONE), row), NONE)


@_scalar
def _softmax_row(args, row):
    """Sum a row, and write it if there is where to.

    One that stays in a core's cache has its exponentials kept where the result goes, which costs less there
    than computing them twice; in half precision it would cost digits.
    """
    n, x, place, y = get_i64(args, Args.COUNT), _x(args, row), _sum(args, row), get_i64(args, Args.Y)
    if y != 0 and n <= get_i64(args, Args.SHORT) and not IS_HALF:
        total = exponentials(x, _y(args, row), n, largest(x, n))
        multiply(_y(args, row), n, ONE / total)
        return
    _fold_whole(x, n, ZERO, place)
    _again(x, n, place)
    if y != 0:
        for begin in range(0, n, PIECE):
            _write(args, row, begin, min(PIECE, n - begin))


@_scalar
def _merge_row(args, row, pieces):
    """The sum of a row's pieces."""
    place = _sum(args, row)
    _start(place)
    for number in range(row * pieces, (row + 1) * pieces):
        join(place, get_i64(args, Args.PARTS) + number * 2 * WIDTH)
    store_f(place, 2, ZERO, NONE)
    _again(_x(args, row), get_i64(args, Args.COUNT), place)


@_scalar
def _fold_piece(args, row, begin, n, number):
    place = get_i64(args, Args.PARTS) + number * 2 * WIDTH
    _start(place)
    fold(_x(args, row) + begin * SIZE, n, ZERO, place)


@_scalar
def _dot(args, row, begin, n):
    """The products of a piece of softmax's result with its gradient."""
    grad = get_i64(args, Args.GRAD) + row * get_i64(args, Args.GRAD_STRIDE) * SIZE
    return dot(_x(args, row) + begin * SIZE, grad + begin * SIZE, n)


@_scalar
def _back(args, row, begin, n, pieces):
    """The gradient of a piece."""
    parts, total, whole = get_i64(args, Args.PARTS), F(0), get_i64(args, Args.COUNT)
    for k in range(-(-whole // PIECE)):
        if parts != 0:
            total += load_f(parts, row * pieces + k)
        else:
            total += _dot(args, row, k * PIECE, min(PIECE, whole - k * PIECE))
    grad = get_i64(args, Args.GRAD) + (row * get_i64(args, Args.GRAD_STRIDE) + begin) * SIZE
    back(_x(args, row) + begin * SIZE, grad, _y(args, row) + begin * SIZE, n, total)


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def run(pointer):
    """What is wanted of each row, or of each piece."""
    args = address(pointer)
    what, tasks, step = get_i64(args, Args.WHAT), get_i64(args, Args.TASKS), get_i64(args, Args.STEP)
    pieces, n = get_i64(args, Args.PIECES), get_i64(args, Args.COUNT)
    while True:
        start = take(args) * step
        if start >= tasks:
            break
        for number in range(start, min(start + step, tasks)):
            row, begin = number // pieces, number % pieces * PIECE
            length = n if pieces == 1 else min(PIECE, n - begin)
            if what == What.SOFTMAX:
                _softmax_row(args, row)
            elif what == What.FOLD:
                _fold_piece(args, row, begin, length, number)
            elif what == What.MERGE:
                _merge_row(args, row, get_i64(args, Args.PARTED))
            elif what == What.WRITE:
                _write(args, row, begin, length)
            elif what == What.DOT:
                store_f(get_i64(args, Args.PARTS), number, _dot(args, row, begin, length), NONE)
            else:
                _back(args, row, begin, length, pieces)
