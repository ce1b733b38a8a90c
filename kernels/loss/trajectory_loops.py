"""The trajectory loss on CPU: one loop over samples, compiled for a dtype of logits and one of pasts.

Not to be imported: `optx.kernels.loss.trajectory_cpu` runs its text once per pair of dtypes, with other
values of DTYPE and PAST, since the compiler's disk cache is kept by file.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import ITEMSIZE, address, get_f64, get_i64, load, put_f64, store
from optx.kernels.jit import cfunc, part
from optx.kernels.loss.trajectory_cpu import Args
from optx.kernels.loss.trajectory_rows import LOWEST

DTYPE = "float32"
PAST = "float16"
IS_WIDE: bool = DTYPE.endswith("64") or PAST.endswith("64")

MATH = "float64" if IS_WIDE else "float32"
F = np.float64 if IS_WIDE else np.float32
Z = np.float64 if DTYPE.endswith("64") else np.float32
P = np.float64 if PAST.endswith("64") else np.float32
SIZE, PAST_SIZE = ITEMSIZE[DTYPE], ITEMSIZE[PAST]
FLOOR = F(LOWEST)
NONE = np.int32(0)  # no random bits: round to nearest

load_z, load_past, load_work, load_tag, load_flag = (
    load(DTYPE, 0),
    load(PAST, 1),
    load(MATH, 2),
    load("int32", 3),
    load("bool", 4),
)
store_past, store_work, store_tag, store_grad, store_loss = (
    store(PAST, 1),
    store(MATH, 2),
    store("int32", 3),
    store(DTYPE, 5),
    store(MATH, 6),
)

_scalar = part(error_model="numpy")


@_scalar
def _largest_logit(z, n):
    """NaN if one is, as torch has it."""
    top = F(load_z(z, 0))
    for k in range(1, n):
        x = F(load_z(z, k))
        top = x if x > top or x != x else top
    return top


@_scalar
def _largest_past(past, n):
    top = F(load_past(past, 0))
    for k in range(1, n):
        x = F(load_past(past, k))
        top = x if x > top or x != x else top
    return top


@_scalar
def _below(x, top):
    """How far below the largest, at most so far; NaN stays."""
    x -= top
    return FLOOR if x < FLOOR else x


@_scalar
def _divergence(z, past, n, tau, work):
    """KL(softmax(past / tau) || softmax(z / tau)); the exponentials and their sums stay in ``work``."""
    top, past_top = _largest_logit(z, n), _largest_past(past, n)
    total, past_total, moved = F(0), F(0), F(0)
    for k in range(n):
        a = _below(F(load_z(z, k)), top) / tau
        b = _below(F(load_past(past, k)), past_top) / tau
        p, q = np.exp(a), np.exp(b)
        total += p
        past_total += q
        moved += q * (b - a)
        store_work(work, k, p, NONE)
        store_work(work, n + k, q, NONE)
    store_work(work, 2 * n, total, NONE)
    store_work(work, 2 * n + 1, past_total, NONE)
    return moved / past_total + np.log(total / past_total)


@_scalar
def _write_gradient(grad, n, work):
    """softmax(z / tau) - softmax(past / tau)."""
    total, past_total = load_work(work, 2 * n), load_work(work, 2 * n + 1)
    for k in range(n):
        change = load_work(work, k) / total - load_work(work, n + k) / past_total
        store_grad(grad, k, Z(change), NONE)


@_scalar
def _write_zeros(grad, n):
    for k in range(n):
        store_grad(grad, k, Z(0), NONE)


@_scalar
def _record(args, z, past, n):
    top = _largest_logit(z, n)
    for k in range(n):
        store_past(past, k, P(_below(F(load_z(z, k)), top)), NONE)


@_scalar
def _row(args, row, place):
    """One sample: the loss and its gradient, then the record."""
    n = get_i64(args, Args.CLASSES)
    z = get_i64(args, Args.LOGITS) + row * get_i64(args, Args.STRIDE) * SIZE
    past = get_i64(args, Args.PAST) + place * get_i64(args, Args.PAST_STRIDE) * PAST_SIZE
    tags, where, grad = get_i64(args, Args.TAGS), get_i64(args, Args.WHERE), get_i64(args, Args.GRAD)
    if tags != 0:
        tag = np.int64(load_tag(tags, place))
        served, again = tag == get_i64(args, Args.WANTED), tag == get_i64(args, Args.EPOCH)
    else:
        served, again = True, False
    if again:
        put_f64(args, Args.AGAIN, get_f64(args, Args.AGAIN) + 1.0)
    if grad != 0:
        if served:
            put_f64(args, Args.SERVED, get_f64(args, Args.SERVED) + 1.0)
        grad += row * n * SIZE
        loss = F(np.nan)
        if served and (where == 0 or load_flag(where, row) != 0):
            work = get_i64(args, Args.WORK)
            loss = _divergence(z, past, n, F(get_f64(args, Args.TAU)), work)
        store_loss(get_i64(args, Args.LOSSES), row, loss, NONE)
        if abs(loss) < np.inf:
            put_f64(args, Args.TOTAL, get_f64(args, Args.TOTAL) + np.float64(loss))
            _write_gradient(grad, n, get_i64(args, Args.WORK))
        else:
            _write_zeros(grad, n)
    if tags != 0:
        _record(args, z, past, n)
        store_tag(tags, place, np.float64(get_i64(args, Args.EPOCH)), NONE)


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def run(pointer):
    """All samples, in their order."""
    args = address(pointer)
    index = get_i64(args, Args.INDEX)
    for row in range(get_i64(args, Args.ROWS)):
        _row(args, row, get_i64(index, row) if index != 0 else row)
