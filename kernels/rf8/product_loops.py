"""Products with RF8's bytes on CPU, compiled by Numba: rows are decoded on the way to the sums.

Not to be imported: `optx.kernels.rf8.cpu` runs its text. Of one vector a byte is a number in a register; for
several a stretch of a row is decoded into the nearest cache once, and multiplied with each.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_i64, load, store, take
from optx.kernels.cpu_formats import room
from optx.kernels.jit import cfunc, part
from optx.kernels.rf8.cpu import Product, add_product, decode, unit

KERNEL = types.void(types.voidptr)
NONE = np.int32(0)
STRETCH = 2048  # numbers that are decoded at once
read_x, read_w = load("float32", 0), load("float32", 3)
write_y, write_w = store("float32", 1), store("float32", 3)
stretch_of = room(4 * STRETCH)


@part(error_model="numpy")
def row_times(codes, x, columns):
    """A row times one vector."""
    total = np.float32(0)
    for i in range(columns):
        total = add_product(total, read_x(x, i), decode(codes, i))
    return total


@part(error_model="numpy")
def stretch_times(decoded, x, count):
    """A decoded stretch times one vector's."""
    total = np.float32(0)
    for i in range(count):
        total = add_product(total, read_x(x, i), read_w(decoded, i))
    return total


@part(error_model="numpy")
def decode_stretch(codes, decoded, count):
    """A stretch of a row, decoded."""
    for i in range(count):
        write_w(decoded, i, decode(codes, i), NONE)


@cfunc(KERNEL, error_model="numpy", cache=True)
def multiply(pointer):
    """y = x @ w.T."""
    args = address(pointer)
    rows, step, columns = (
        get_i64(args, Product.ROWS),
        get_i64(args, Product.STEP),
        get_i64(args, Product.COLUMNS),
    )
    batch, codes = get_i64(args, Product.BATCH), get_i64(args, Product.CODES)
    x, y = get_i64(args, Product.X), get_i64(args, Product.Y)
    scale = unit(get_i64(args, Product.E_MAX))
    decoded = stretch_of(0)
    while True:
        start = take(args) * step
        if start >= rows:
            break
        for row in range(start, min(start + step, rows)):
            if batch == 1:
                write_y(y, row, row_times(codes + row * columns, x, columns) * scale, NONE)
            else:
                sums = np.zeros(batch, np.float32)
                for at in range(0, columns, STRETCH):
                    count = min(STRETCH, columns - at)
                    decode_stretch(codes + row * columns + at, decoded, count)
                    for b in range(batch):
                        sums[b] += stretch_times(decoded, x + 4 * (b * columns + at), count)
                for b in range(batch):
                    write_y(y, b * rows + row, sums[b] * scale, NONE)
