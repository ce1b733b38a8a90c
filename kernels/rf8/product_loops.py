"""Products with RF8's bytes on CPU, compiled by Numba: rows are decoded on the way to the sums.

Not to be imported: `optx.kernels.rf8.cpu` runs its text. A byte is a number in a register, for four vectors
at a time, or for one.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_i64, load, scratch, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.rf8.cpu import Product, add_product, decode, unit
from optx.kernels.rf8.vectors import BLOCK, dots

KERNEL = types.void(types.voidptr)
NONE = np.int32(0)
read_x, read_sum = load("float32", 0), load("float32", 3)
write_y = store("float32", 1)
one, four = dots(1), dots(4)


@part(error_model="numpy", inline="always")
def tail(codes, x, begin, columns):
    """What is left of a row, times one vector."""
    total = np.float32(0)
    for i in range(begin, columns):
        total = add_product(total, read_x(x, i), decode(codes, i))
    return total


@cfunc(KERNEL, error_model="numpy", cache=True)
def multiply(pointer):
    """y = x @ w.T."""
    args = address(pointer)
    rows, step = get_i64(args, Product.ROWS), get_i64(args, Product.STEP)
    columns, batch = get_i64(args, Product.COLUMNS), get_i64(args, Product.BATCH)
    codes, x, y = get_i64(args, Product.CODES), get_i64(args, Product.X), get_i64(args, Product.Y)
    scale, sums = unit(get_i64(args, Product.E_MAX)), scratch(0)
    blocks, stride = columns // BLOCK, 4 * columns
    while True:
        start = take(args) * step
        if start >= rows:
            break
        for row in range(start, min(start + step, rows)):
            own, b = codes + row * columns, 0
            while b < batch:
                count = 4 if b + 4 <= batch else 1
                if count == 4:
                    four(own, x + b * stride, stride, sums, blocks)
                else:
                    one(own, x + b * stride, stride, sums, blocks)
                for v in range(count):
                    total = read_sum(sums, v) + tail(own, x + (b + v) * stride, blocks * BLOCK, columns)
                    write_y(y, (b + v) * rows + row, total * scale, NONE)
                b += count
