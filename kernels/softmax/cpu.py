"""Softmax in two passes on CPU: a row is read to be summed, read again, and written.

A short row, which stays in a cache, is read there as often as costs least. What is much larger than caches is
written past them, so that memory need not be read first.

The loops are in `optx.kernels.softmax.softmax_loops`, their instructions in
`optx.kernels.softmax.operations`. Rows are split over torch's threads, and a few long ones piece by piece.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.generated import load_loops, source
from optx.kernels.softmax.layout import FIELDS

__all__ = ["backward", "fold", "goes_past", "softmax", "spread"]

PIECE = 1 << 16
"""Elements that are summed at a time."""
SHORT = 1 << 16
"""Elements of a row that stays in a core's cache between two reads."""
_CHUNK = 1 << 15  # elements in one piece of work; below, one thread does it all
_FEW = 64  # rows; of more, each is one thread's
_LARGE = 1 << 26  # bytes
_PACKAGE = "optx.kernels.softmax"


class What(IntEnum):
    """What is done with each row, or with each piece of one."""

    SOFTMAX = 0  # sum a row, and write it
    FOLD = 1  # sum a piece
    MERGE = 2  # sum what the pieces of a row have
    WRITE = 3  # write a piece, from its row's sum
    DOT = 4  # sum the products of a piece with its gradient
    BACK = 5  # write the gradient of a piece


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes; addresses unless said otherwise."""

    NEXT = 0  # atomic counter: the next work
    WHAT = 1
    TASKS = 2  # number of rows, or of pieces
    STEP = 3  # how many are taken at a time
    PIECES = 4  # tasks of a row
    PARTED = 5  # pieces of a row that are merged
    COUNT = 6  # elements of a row
    X = 7  # of softmax's backward pass: its result
    STRIDE = 8  # elements from one row to the next
    Y = 9  # rows of COUNT elements, or 0
    SUMS = 10  # (rows, FIELDS)
    PARTS = 11  # of each piece a pair, or a sum; or 0
    SCALES = 12  # one per row, or 0
    LABELS = 13  # int64, or 0
    LONE = 14  # what is taken off a row's label
    GRAD = 15
    GRAD_STRIDE = 16
    PAST = 17  # 1: Y is written past the caches
    SHORT = 18  # elements of a row that is read in a cache as often as costs least


_Block = ctypes.c_int64 * len(Args)


def softmax(x: Tensor, y: Tensor | None = None, short: int = SHORT) -> Tensor:
    """Softmax of each row.

    Args:
        x: shape (R, N), last stride 1, N above 0.
        y: where to, contiguous; None: a new tensor.
        short: longer rows are summed in one pass and written in another.
    """
    sums, y = _sums(x), torch.empty(x.shape, dtype=x.dtype) if y is None else y
    places = {Args.SUMS: sums, Args.Y: y, Args.PAST: goes_past(y), Args.SHORT: short}
    if _split(x):
        _fold_pieces(x, sums)
        _run(What.WRITE, x, places, _pieces(x))
    else:
        _run(What.SOFTMAX, x, places)
    return y


def fold(x: Tensor) -> Tensor:
    """Each row's sum of exponentials, as three numbers; see `optx.kernels.softmax.layout.FIELDS`."""
    sums = _sums(x)
    if _split(x):
        _fold_pieces(x, sums)
    else:
        _run(What.SOFTMAX, x, {Args.SUMS: sums})
    return sums


def spread(x: Tensor, sums: Tensor, scale: Tensor, labels: Tensor | None, lone: Tensor | None) -> Tensor:
    """``scale softmax(x)``, less ``lone`` at each row's label.

    Args:
        x: as for `fold`.
        sums: from there.
        scale: (R,), contiguous, in the dtype of arithmetic; rows of scale 0 are all zeros.
        labels: (R,) int64, contiguous, in range.
        lone: (R,), as ``scale``.
    """
    y = torch.empty(x.shape, dtype=x.dtype)
    places = {Args.SUMS: sums, Args.Y: y, Args.SCALES: scale, Args.PAST: goes_past(y)}
    if labels is not None and lone is not None:
        places |= {Args.LABELS: labels, Args.LONE: lone}
    _run(What.WRITE, x, places, _pieces(x))
    return y


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """Softmax's gradient, from that of its result.

    Args:
        grad: (R, N), last stride 1.
        y: the result, as ``grad``.
    """
    x = torch.empty(y.shape, dtype=y.dtype)
    places = {Args.Y: x, Args.GRAD: grad, Args.GRAD_STRIDE: grad.stride(0)}
    pieces = _pieces(y) if _split(y) else 1
    if pieces > 1:
        parts = torch.empty(y.shape[0], pieces, dtype=_math(y))
        places[Args.PARTS] = parts
        _run(What.DOT, y, places, pieces)
    _run(What.BACK, y, places, pieces)
    return x


def _math(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], FIELDS, dtype=_math(x))


def _pieces(x: Tensor) -> int:
    return -(-x.shape[1] // PIECE)


def goes_past(y: Tensor) -> int:
    """1 where the result is larger than most caches and all its rows are multiples of a cache line."""
    row = y.shape[1] * y.element_size()
    return int(y.nbytes >= _LARGE and row % 64 == 0 and y.data_ptr() % 64 == 0)


def _split(x: Tensor) -> bool:
    return x.shape[0] < _FEW and x.shape[1] > PIECE


def _fold_pieces(x: Tensor, sums: Tensor) -> None:
    pieces = _pieces(x)
    parts = torch.empty(x.shape[0], pieces, 2, dtype=sums.dtype)
    _run(What.FOLD, x, {Args.PARTS: parts}, pieces)
    _run(What.MERGE, x, {Args.SUMS: sums, Args.PARTS: parts, Args.PARTED: pieces})


def _run(what: What, x: Tensor, places: Mapping[Args, Tensor | int], pieces: int = 1) -> None:
    rows, count = x.shape
    block = _Block(0, what, rows * pieces, max(1, _CHUNK * pieces // count), pieces)
    block[Args.COUNT], block[Args.STRIDE], block[Args.X] = count, x.stride(0), x.data_ptr()
    for at, value in places.items():
        block[at] = value.data_ptr() if isinstance(value, Tensor) else value
    parallel = rows * count > _CHUNK and what != What.MERGE
    cpu.run(_kernel(x.dtype), ctypes.addressof(block), parallel)


@functools.cache
def _kernel(dtype: torch.dtype) -> int:
    """The address of the loops for one dtype, compiled, from the disk cache where they were before."""
    files = ("cpu.py", "layout.py", "vectors.py", "operations.py")
    imported = cpu.digest() + "".join(source(_PACKAGE, file) for file in files)
    name = str(dtype).removeprefix("torch.")
    return vars(load_loops("softmax", _PACKAGE, "softmax_loops.py", imported, DTYPE=name))["run"].address
