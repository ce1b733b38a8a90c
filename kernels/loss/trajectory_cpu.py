"""The trajectory loss of a few classes on CPU, its gradient and the record of outputs, in one pass.

For small batches of few classes, where torch's two dozen operations cost more to call than to compute. Above
`LARGEST` numbers torch's vectorised exponentials are the faster. The loops are in
`optx.kernels.loss.trajectory_loops`; the mathematics are those of `optx.kernels.loss.trajectory_rows`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from enum import IntEnum
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.generated import load_module, source
from optx.kernels.loss import trajectory_rows

LARGEST = 1 << 14
"""Logits of a batch; beyond, torch's operations are as fast."""

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes; addresses unless said otherwise."""

    ROWS = 0  # number
    CLASSES = 1  # number
    LOGITS = 2
    STRIDE = 3  # elements from one row of logits to the next
    PAST = 4  # the reference, or an epoch's part of a record
    PAST_STRIDE = 5
    INDEX = 6  # int64: which row of PAST is a sample's, or 0: as the logits lie
    TAGS = 7  # int32: of which epoch each row of PAST is; 0: there is no record
    WANTED = 8  # the epoch that serves as the past
    EPOCH = 9  # the one that is recorded
    WHERE = 10  # bool: which rows count, or 0
    TAU = 11  # float64
    GRAD = 12  # p - q, or 0: there is no loss
    LOSSES = 13  # each row's divergence, NaN where there is none
    WORK = 14  # room for two rows and their sums
    TOTAL = 15  # float64: the sum of divergences
    SERVED = 16  # float64: rows with a past
    AGAIN = 17  # float64: rows that were recorded in this epoch already


_BLOCK = struct.Struct("=11qd3q3d")
"""The block of `Args`."""
_SUMS = struct.Struct("=3d")


class Sums(NamedTuple):
    """What `divergence` and `recorded` give.

    Attributes:
        total: the sum of the divergences.
        losses: each row's, NaN where there is none; what is behind the last row means nothing.
        gradient: p - q of each, 0 where there is none, in the logits' dtype; by tau it is the sum's.
        served: how many rows have a past.
        again: how many were recorded in this epoch before.
    """

    total: float
    losses: Tensor | None
    gradient: Tensor | None
    served: int
    again: int


def serves(logits: Tensor) -> bool:
    """Whether these logits, on a CPU, are few and plain."""
    return (
        type(logits) in _PLAIN
        and logits.dtype in _FLOATS
        and logits.numel() <= LARGEST
        and logits.stride(-1) == 1
    )


def divergence(logits: Tensor, past: Tensor, tau: float, where: Tensor | None) -> Sums:
    """KL(softmax(past / tau) || softmax(logits / tau)) of each row, and the gradient.

    Args:
        logits: (R, C), last stride 1.
        past: (R, C), last stride 1.
        tau: the temperature.
        where: (R,) bool, contiguous: which rows count; None: all.
    """
    place = (past.data_ptr(), past.stride(0), 0, 0, 0, 0)
    return _run(logits, past.dtype, place, tau, where, True)


def recorded(
    logits: Tensor,
    table: Tensor,
    tags: Tensor,
    index: Tensor,
    slot: int,
    epochs: tuple[int, int],
    tau: float,
    where: Tensor | None,
    loss: bool,
) -> Sums:
    """`divergence` from rows of a table, which then get these logits, less the largest one of each row.

    Args:
        logits: (B, C), last stride 1.
        table: (slots, N, C), contiguous.
        tags: (slots, N) int32, contiguous: of which epoch each row of the table is.
        index: (B,) int64, contiguous: rows of the table, each once, in range.
        slot: which part of the table is read and written.
        epochs: the one that serves as the past, and the one that is now.
        tau: the temperature.
        where: (B,) bool, contiguous: which rows count; None: all.
        loss: False: record only.
    """
    rows, classes = table.shape[1:]
    place = (
        table.data_ptr() + slot * rows * classes * table.element_size(),
        classes,
        index.data_ptr(),
        tags.data_ptr() + slot * rows * 4,
        *epochs,
    )
    return _run(logits, table.dtype, place, tau, where, loss)


def _run(
    logits: Tensor, past: torch.dtype, place: tuple[int, ...], tau: float, where: Tensor | None, loss: bool
) -> Sums:
    """Place: the arguments from PAST to EPOCH."""
    rows, classes = logits.shape
    losses = gradient = None
    outputs = (0, 0, 0)
    if loss:
        wide = torch.float64 if torch.float64 in (logits.dtype, past) else torch.float32
        losses = torch.empty(rows + 2 * classes + 2, dtype=wide)
        gradient = torch.empty((rows, classes), dtype=logits.dtype)
        at = losses.data_ptr()
        outputs = (gradient.data_ptr(), at, at + rows * losses.element_size())
    flags = 0 if where is None else where.data_ptr()
    head = (rows, classes, logits.data_ptr(), logits.stride(0))
    block = ctypes.create_string_buffer(_BLOCK.size)
    _BLOCK.pack_into(block, 0, *head, *place, flags, tau, *outputs, 0.0, 0.0, 0.0)
    cpu.run(_kernel(logits.dtype, past), ctypes.addressof(block), parallel=False)
    total, served, again = _SUMS.unpack_from(block, 8 * Args.TOTAL)
    return Sums(total, losses, gradient, int(served), int(again))


@functools.cache
def _kernel(dtype: torch.dtype, past: torch.dtype) -> int:
    """The address of the loop."""
    return vars(_compiled(dtype, past))["run"].address


def _compiled(dtype: torch.dtype, past: torch.dtype) -> ModuleType:
    """The loop for a pair of dtypes, compiled, from the disk cache where it was compiled before."""
    text = source("optx.kernels.loss", "trajectory_loops.py")
    for name, default, wanted in (("DTYPE", "float32", dtype), ("PAST", "float16", past)):
        line = f'{name} = "{default}"\n'
        assert text.count(line) == 1
        text = text.replace(line, f'{name} = "{str(wanted).removeprefix("torch.")}"\n')
    # The cache is kept by the text, so what it imports has to be part of that.
    imported = cpu.digest() + source("optx.kernels.loss", "trajectory_cpu.py") + str(trajectory_rows.LOWEST)
    digest = hashlib.sha256(imported.encode()).hexdigest()
    return load_module("trajectory", f"{text}# imports {digest}\n")
