"""Softmax in three passes, written as `optx.kernels.softmax` is, for ``optx bench softmax`` to compare with.

Recompute: the largest entry; the sum of exponentials less it; these once more, times a factor. Reload: the
second pass also writes the exponentials, and the third one scales them. Vectors, exponentials, guards, pieces
and threads are the kernels' own.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportUnknownLambdaType=false, reportPrivateUsage=false
# pyright: reportMissingTypeArgument=false
# mypy: ignore-errors

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import Any

import numba.core.types as nt
import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.cpu import address, get_i64, load, store, take
from optx.kernels.jit import cfunc, part
from optx.kernels.softmax import operations
from optx.kernels.softmax.cpu import PIECE, goes_past
from optx.kernels.softmax.vectors import Row, lanes, walk

F = np.float32
NONE = np.int32(0)
LANES = lanes("float32")


class Pass(IntEnum):
    """What is done with each piece of a row; ``ROW``: all three with a whole row.

    ``PAST``: past the caches, as `optx.kernels.softmax.cpu` writes what is large. Reload's last pass has its
    lines in the caches anyway.
    """

    LARGEST = 0
    SUM = 1
    SUM_AND_STORE = 2
    WRITE = 3
    SCALE = 4
    WRITE_PAST = 5
    RECOMPUTE_ROW = 6
    RELOAD_ROW = 7


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes."""

    NEXT = 0
    PASS = 1
    TASKS = 2
    STEP = 3
    PIECES = 4
    COUNT = 5
    X = 6
    Y = 7
    PARTS = 8  # float32: of all pieces the largest entry, then of all the sum


_Block = ctypes.c_int64 * len(Args)


def _writer(past_the_caches: bool) -> Any:
    """An intrinsic ``(x, y, count, shift, scale)``: ``y = e**(x - shift) scale``."""

    @intrinsic
    def write(_context: Any, _x: Any, _y: Any, _count: Any, _shift: Any, _scale: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            x, y, count, *numbers = values
            shift, scale = (LANES.every(b, number) for number in numbers)

            def body(some: Any) -> Any:
                return b.fmul(LANES.exponential(b, b.fsub(some, shift)), scale)

            walk(b, count, [Row(b, x, "float32")], body, Row(b, y, "float32"), past_the_caches)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, nt.float32, nt.float32), codegen

    return write


@functools.cache
def _compiled() -> tuple[int, Any]:
    """The address of the loops, and what keeps them there."""
    largest, scale_row = operations.largest("float32"), operations.multiply("float32")
    total, total_and_store = (operations.exponentials("float32", stores) for stores in (False, True))
    write, write_past = _writer(False), _writer(True)
    get, put = load("float32", 1), store("float32", 1)
    # Positions and passes as plain numbers, which is what compiled code has of them.
    at, what = Args, Pass

    @part(error_model="numpy")
    def top_of(parts, row, pieces):
        top = F(-np.inf)
        for k in range(pieces):
            top = max(top, get(parts, row * pieces + k))
        return top

    @part(error_model="numpy")
    def factor_of(parts, row, pieces, tasks):
        sum_ = F(0)
        for k in range(pieces):
            sum_ += get(parts, tasks + row * pieces + k)
        return F(1) / sum_

    @part(error_model="numpy")
    def whole_row(x, y, n, reloads):
        top = F(-np.inf)
        for begin in range(0, n, PIECE):
            top = max(top, largest(x + 4 * begin, min(PIECE, n - begin)))
        sum_ = F(0)
        for begin in range(0, n, PIECE):
            length = min(PIECE, n - begin)
            if reloads:
                sum_ += total_and_store(x + 4 * begin, y + 4 * begin, length, top)
            else:
                sum_ += total(x + 4 * begin, y + 4 * begin, length, top)
        if reloads:
            scale_row(y, n, F(1) / sum_)
        else:
            write(x, y, n, top, F(1) / sum_)

    @cfunc(nt.void(nt.voidptr), error_model="numpy")
    def run(pointer):
        args = address(pointer)
        wanted, tasks, step = get_i64(args, at.PASS), get_i64(args, at.TASKS), get_i64(args, at.STEP)
        pieces, n, parts = get_i64(args, at.PIECES), get_i64(args, at.COUNT), get_i64(args, at.PARTS)
        while True:
            start = take(args) * step
            if start >= tasks:
                break
            for number in range(start, min(start + step, tasks)):
                row, begin = number // pieces, number % pieces * PIECE
                length = n if pieces == 1 else min(PIECE, n - begin)
                x, y = (
                    get_i64(args, at.X) + 4 * (row * n + begin),
                    get_i64(args, at.Y) + 4 * (row * n + begin),
                )
                if wanted >= what.RECOMPUTE_ROW:
                    whole_row(x, y, n, wanted == what.RELOAD_ROW)
                    continue
                if wanted == what.LARGEST:
                    put(parts, number, largest(x, length), NONE)
                    continue
                if wanted == what.SCALE:
                    scale_row(y, length, factor_of(parts, row, pieces, tasks))
                    continue
                top = top_of(parts, row, pieces)
                if wanted == what.SUM:
                    put(parts, tasks + number, total(x, y, length, top), NONE)
                elif wanted == what.SUM_AND_STORE:
                    put(parts, tasks + number, total_and_store(x, y, length, top), NONE)
                elif wanted == what.WRITE:
                    write(x, y, length, top, factor_of(parts, row, pieces, tasks))
                else:
                    write_past(x, y, length, top, factor_of(parts, row, pieces, tasks))

    return run.address, run


def softmax(x: Tensor, y: Tensor, reloads: bool) -> None:
    """Softmax of each row of ``x`` into ``y``, both contiguous and of float32, in three passes."""
    rows, count = x.shape
    if count <= PIECE or rows >= 64:  # as `optx.kernels.softmax.cpu` splits
        _run(Pass.RELOAD_ROW if reloads else Pass.RECOMPUTE_ROW, x, y, 1)
        return
    pieces = -(-count // PIECE)
    parts = torch.empty(2, rows, pieces)
    _run(Pass.LARGEST, x, y, pieces, parts)
    _run(Pass.SUM_AND_STORE if reloads else Pass.SUM, x, y, pieces, parts)
    write = Pass.WRITE_PAST if goes_past(y) else Pass.WRITE
    _run(Pass.SCALE if reloads else write, x, y, pieces, parts)


def _run(wanted: Pass, x: Tensor, y: Tensor, pieces: int, parts: Tensor | None = None) -> None:
    rows, count = x.shape
    block = _Block(0, wanted, rows * pieces, max(1, (1 << 15) * pieces // count), pieces, count)
    block[Args.X], block[Args.Y] = x.data_ptr(), y.data_ptr()
    if parts is not None:
        block[Args.PARTS] = parts.data_ptr()
    cpu.run(_compiled()[0], ctypes.addressof(block), parallel=rows * count > 1 << 15)
