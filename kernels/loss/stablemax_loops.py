"""StableMax cross-entropy on CPU: the loops over rows, compiled by Numba for one dtype of logits.

Not to be imported: `optx.kernels.loss.stablemax_cpu` runs its text once per dtype, with another
value of DTYPE, since the compiler's disk cache is kept by file. Elements are read through raw addresses
(`optx.kernels.cpu`).
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import ITEMSIZE, address, get_f64, get_i64, load, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.loss.stablemax_cpu import Args
from optx.kernels.loss.stablemax_rows import terms

DTYPE = "float32"
IS_WIDE: bool = DTYPE.endswith("64")

MATH = "float64" if IS_WIDE else "float32"
F = np.float64 if IS_WIDE else np.float32
SIZE = ITEMSIZE[DTYPE]
ONE = F(1)
NONE = np.int32(0)  # no random bits: round to nearest

load_z, load_f = load(DTYPE, 0), load(MATH, 1)
store_z, store_f = store(DTYPE, 2), store(MATH, 3)


@part(error_model="numpy", inline="always")
def _where(condition, a, b):
    return a if condition else b


_numerator = part(error_model="numpy", inline="always")(terms)
# Sums may be regrouped into lanes; which grouping is fixed at compile time.
_lanes = part(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
_scalar = part(error_model="numpy")


@_lanes
def _sum_terms(z, start, stop):
    """The sum of s over some classes."""
    total = F(0)
    for k in range(start, stop):
        s, _ = _numerator(load_z(z, k), ONE, _where)
        total += s
    return total


@_lanes
def _product(z, start, stop):
    total = 1.0
    for k in range(start, stop):
        s, _ = _numerator(load_z(z, k), ONE, _where)
        total *= np.float64(s)
    return total


@_scalar
def _sum_logs(z, n):
    """The sum of log s over all classes: one logarithm per 64 classes, of their product.

    The product of 64 terms stays in range for |z| below 4e4; beyond, each term is taken by itself.
    """
    total = 0.0
    for start in range(0, n, 64):
        stop = min(start + 64, n)
        product = _product(z, start, stop)
        if 1e-300 < product < 1e300:
            total += np.log(product)
        else:
            for k in range(start, stop):
                s, _ = _numerator(load_z(z, k), ONE, _where)
                total += np.log(np.float64(s))
    return total


@_lanes
def _write_gradient(z, result, n, factor, shift):
    """The gradient at every class, as if none was the label: h' (factor s - shift)."""
    for k in range(n):
        s, slope = _numerator(load_z(z, k), ONE, _where)
        store_z(result, k, slope * (factor * s - shift), NONE)


@_scalar
def _write_zeros(result, n):
    for k in range(n):
        store_z(result, k, F(0), NONE)


@_scalar
def _share(args, label):
    """The weight of the label's own term."""
    share = F(1) - F(get_f64(args, Args.SMOOTHING))
    weight = get_i64(args, Args.WEIGHT)
    return share * load_f(weight, label) if weight != 0 else share


@_scalar
def _forward_row(args, row, label):
    n = get_i64(args, Args.CLASSES)
    loss, rest = F(0), F(0)
    if label != get_i64(args, Args.IGNORE):
        z = get_i64(args, Args.LOGITS) + row * get_i64(args, Args.STRIDE) * SIZE
        own, _ = _numerator(load_z(z, label), ONE, _where)
        rest = _sum_terms(z, 0, label) + _sum_terms(z, label + 1, n)
        loss = _share(args, label) * F(np.log1p(rest / own))
        smoothing = get_f64(args, Args.SMOOTHING)
        if smoothing > 0.0:
            loss += F(smoothing * (np.log(np.float64(rest + own)) - _sum_logs(z, n) / n))
    store_f(get_i64(args, Args.LOSS), row, loss, NONE)
    store_f(get_i64(args, Args.REST), row, rest, NONE)


@_scalar
def _backward_row(args, row, label):
    n = get_i64(args, Args.CLASSES)
    result = get_i64(args, Args.RESULT) + row * n * SIZE
    if label == get_i64(args, Args.IGNORE):  # its logits are not looked at: they may be anything
        _write_zeros(result, n)
        return
    z = get_i64(args, Args.LOGITS) + row * get_i64(args, Args.STRIDE) * SIZE
    scale = load_f(get_i64(args, Args.GRAD), row)
    rest = load_f(get_i64(args, Args.REST), row)
    own, slope = _numerator(load_z(z, label), ONE, _where)
    smoothing = F(get_f64(args, Args.SMOOTHING))
    gain = scale * _share(args, label) / (rest + own)
    even = scale * smoothing / (rest + own)
    shift = scale * smoothing / F(n)
    _write_gradient(z, result, n, gain + even, shift)
    store_z(result, label, slope * (even * own - shift - gain * rest), NONE)


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def forward(pointer):
    """Loss and sum of each row."""
    args = address(pointer)
    rows, step = get_i64(args, Args.ROWS), get_i64(args, Args.STEP)
    while True:
        start = take(args) * step
        if start >= rows:
            break
        for row in range(start, min(start + step, rows)):
            _forward_row(args, row, get_i64(get_i64(args, Args.LABELS), row))


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def backward(pointer):
    """Gradient of each row."""
    args = address(pointer)
    rows, step = get_i64(args, Args.ROWS), get_i64(args, Args.STEP)
    while True:
        start = take(args) * step
        if start >= rows:
            break
        for row in range(start, min(start + step, rows)):
            _backward_row(args, row, get_i64(get_i64(args, Args.LABELS), row))
