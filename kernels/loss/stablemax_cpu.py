"""StableMax cross-entropy on CPU: one pass over the logits in either direction, rows over torch's threads.

The loops are in `optx.kernels.loss.stablemax_loops`; the mathematics, and the two functions exported here,
are those of `optx.kernels.loss.stablemax_rows`. Class numbers are served, with or without class weights or
label smoothing. Class probabilities, and smoothing over weighted classes, need a logarithm per logit: torch's
own vectorised one is the faster there, so these go to its operations.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import struct
from enum import IntEnum
from types import ModuleType

import torch
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.generated import load_loops
from optx.kernels.loss import stablemax_rows as torch_rows
from optx.kernels.loss.stablemax_rows import Options, RowSums, math_dtype

__all__ = ["backward", "forward"]

_CHUNK = 1 << 15  # logits in one piece of work; below, one thread does it all


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes; addresses unless said otherwise."""

    NEXT = 0  # atomic counter: the next chunk
    ROWS = 1  # number
    STEP = 2  # rows in a chunk
    CLASSES = 3  # number
    LOGITS = 4
    STRIDE = 5  # elements from one row of logits to the next
    LABELS = 6  # int64
    IGNORE = 7  # the label that is not counted
    WEIGHT = 8  # one per class, or 0
    SMOOTHING = 9  # float64
    LOSS = 10
    REST = 11
    GRAD = 12  # of each row's loss
    RESULT = 13


def forward(logits: Tensor, target: Tensor, options: Options) -> RowSums:
    """Loss and sums of each row; see `optx.kernels.loss.stablemax_rows.forward`.

    Args:
        logits: shape (R, C), last stride 1.
        target: labels, int64 (R,), contiguous, in range; or probabilities (R, C).
        options: class weights, ignored label, smoothing.
    """
    if not _serves(target, options):
        return torch_rows.chunked_forward(logits, target, options)
    rows = logits.shape[0]
    loss, rest = (torch.empty(rows, dtype=math_dtype(logits.dtype)) for _ in range(2))
    _run("forward", logits, target, options, {Args.LOSS: loss, Args.REST: rest})
    mass = torch.full((1,), options.smoothing, dtype=loss.dtype).expand(rows) if options.smoothing else None
    return RowSums(loss, rest, mass)


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, rest: Tensor, mass: Tensor | None, options: Options
) -> Tensor:
    """Gradient of the logits; see `optx.kernels.loss.stablemax_rows.backward`."""
    if not _serves(target, options):
        return torch_rows.chunked_backward(grad, logits, target, rest, mass, options)
    result = torch.empty(logits.shape, dtype=logits.dtype)
    grad = grad.contiguous()
    _run("backward", logits, target, options, {Args.GRAD: grad, Args.REST: rest, Args.RESULT: result})
    return result


def _serves(target: Tensor, options: Options) -> bool:
    return not target.is_floating_point() and (options.weight is None or options.smoothing == 0.0)


def _run(
    direction: str, logits: Tensor, target: Tensor, options: Options, places: dict[Args, Tensor]
) -> None:
    rows, classes = logits.shape
    values = {
        Args.ROWS: rows,
        Args.STEP: max(1, _CHUNK // classes),
        Args.CLASSES: classes,
        Args.STRIDE: logits.stride(0),
        Args.IGNORE: options.ignore_index,
        Args.WEIGHT: 0 if options.weight is None else options.weight.data_ptr(),
        Args.SMOOTHING: _bits(options.smoothing),
    }
    places = {Args.LOGITS: logits, Args.LABELS: target, **places}
    values |= {at: tensor.data_ptr() for at, tensor in places.items()}
    block = (ctypes.c_int64 * len(Args))(*(values.get(at, 0) for at in Args))
    kernel: int = vars(_compiled(str(logits.dtype).removeprefix("torch.")))[direction].address
    cpu.run(kernel, ctypes.addressof(block), parallel=rows * classes > _CHUNK)


def _bits(x: float) -> int:
    """The bits of a float64 as an int64."""
    return struct.unpack("q", struct.pack("d", x))[0]


@functools.cache
def _compiled(dtype: str) -> ModuleType:
    """The loops for one dtype, compiled, from the disk cache where they were compiled before."""
    imported = cpu.digest() + inspect.getsource(torch_rows.terms)
    return load_loops("stablemax", "optx.kernels.loss", "stablemax_loops.py", imported, DTYPE=dtype)
