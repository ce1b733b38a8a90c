"""Merging entry by entry: what is kept of each change, weighed, elected or not, summed, and put on the base.

The same is computed in two ways: by torch's operations on changes that were taken before, of any kind and on
any device; and, where base and models are plain numbers of the CPU's, by one compiled pass that reads them
and writes the result. Bit for bit they give the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx._buffers import PIECE, empty
from optx.delta._combine import elected, mixed
from optx.delta._kept import Kept, Trim
from optx.delta._merge_method import Raw
from optx.delta._random_mask import Dropout
from optx.kernels.available import why_unavailable

BLOCK = 512
"""Numbers that the loops take at a time."""
ROW = 1 << 14
"""Numbers whose magnitudes are one sum."""
CHUNK = 4 * ROW
"""Numbers that a thread takes."""
FEW = 1 << 15
"""Of fewer numbers torch's operations merge a piece in less than a millisecond."""


class Args(IntEnum):
    """Positions in the loops' block of arguments, in units of 8 bytes; addresses unless said otherwise."""

    NEXT = 0  # atomic counter: the next chunk
    SLOT = 1  # atomic counter: the next thread
    NUMEL = 2  # number
    BEGIN = 3  # number: place of the first in its tensor
    COUNT = 4  # number: of models
    MEASURES = 5  # number: 0 to merge, else magnitudes are summed
    ELECTS = 6  # number: 0 no, 1 a sum of 0 is positive, 2 it is negative
    OUT = 7  # of the result, or of float64 sums
    OUT_KIND = 8  # number, see `KINDS`
    MODELS = 9  # rows of int64, see `Model`; the row before is the base's
    NUMBERS = 10  # rows of float64, see `Number`
    FACTORS = 11  # float64, see `Factor`
    ROOM = 12  # the threads' blocks
    STRIDE = 13  # number: bytes of one thread's


class Model(IntEnum):
    """What is known of a model, in integers."""

    FROM = 0  # address
    KIND = 1
    BY = 2  # what keeps: 0 all, 1 a dropout, 2 a trim
    KEY = 3
    LIMIT = 4  # the dropout's threshold, or the trim's stop


class Number(IntEnum):
    """What is known of a model, in float64."""

    DIVISOR = 0
    FACTOR = 1
    WEIGHT = 2
    SIZE = 3


class Factor(IntEnum):
    """What is known of the whole, in float64."""

    LAM = 0
    MASS = 1  # what the sum is divided by; where signs are elected, whether it is
    ROOM = 2  # a number times this is infinite before the result's dtype has no room for it
    BAD = 3  # not 0 afterwards: something isn't finite


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROOM = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 1e34}
_EVERYWHERE = 1 << 62


@functools.cache
def _compiled() -> ModuleType:
    from optx.kernels import cpu
    from optx.kernels.generated import load_module, source

    text = source("optx.delta", "_entrywise_loops.py")
    # The compiler's cache is kept by the text, so what it imports has to be part of that.
    imported = hashlib.sha256((cpu.digest() + source("optx.delta", "_entrywise.py")).encode()).hexdigest()
    return load_module("delta_entrywise", f"{text}# imports {imported}\n")


def served(kept: Sequence[Kept], tensors: Sequence[Tensor]) -> bool:
    """Whether the compiled pass takes these numbers, and is worth the time in which Numba is imported."""
    return (
        tensors[0].numel() >= FEW
        and all(one.by is None or isinstance(one.by, Dropout | Trim) for one in kept)
        and all(t.dtype in KINDS and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and why_unavailable("numba") is None
    )


@dataclass(frozen=True)
class Entrywise:
    """Merges the flat pieces of one tensor.

    Attributes:
        kept: of each model's change.
        weights: likewise.
        normalize: divide by the weights; of the models that take part in an entry, if signs are elected.
        lam: scale of the result.
        elects: 0 for the plain sum; else the sign, 1 or -1, that is elected where the weighted sum is 0.
    """

    kept: Sequence[Kept]
    weights: Sequence[float]
    normalize: bool
    lam: float
    elects: int = 0

    def __call__(self, changes: Sequence[Tensor], begin: int) -> Tensor:
        """By torch's operations, the merged change."""
        kept = [one.of(change, begin) for one, change in zip(self.kept, changes, strict=True)]
        if self.elects:
            return elected(kept, self.weights, self.normalize, self.lam, self.elects)
        return mixed(kept, self.weights, self.normalize, self.lam)

    def onto(self, base: Tensor, models: Sequence[Tensor], begin: int, dtype: torch.dtype) -> Tensor | None:
        """In one pass, the base with the merged change; None where that isn't `served`, or isn't finite.

        Args:
            base: flat.
            models: likewise.
            begin: place of the first number.
            dtype: of the result.
        """
        if dtype not in KINDS or not served(self.kept, [base, *models]):
            return None
        made = empty(base.numel(), dtype)
        mass = sum(self.weights)
        divides = self.normalize and (bool(self.elects) or abs(mass) >= 1e-8)
        mass = float(divides) if self.elects else mass if divides else 1.0
        more = {
            Args.ELECTS: (0, 1, 2)[self.elects],
            Args.OUT: made.data_ptr(),
            Args.OUT_KIND: KINDS[dtype],
        }
        factors = (self.lam, mass, _ROOM[dtype])
        return made if _run([base, *models], begin, self.kept, self.weights, factors, more) else None


def magnitudes(kept: Sequence[Kept], raw: Raw, numel: int, step: int) -> list[list[float]] | None:
    """For each model the L1 norm of its change, and that of what is kept of it.

    Args:
        kept: of each model's change, see `served`; scales don't count.
        raw: a tensor's numbers.
        numel: how many.
        step: how many are read at once, a multiple of `ROW`.

    Returns:
        None where that isn't `served`, or something isn't finite.
    """
    rows = list[npt.NDArray[np.float64]]()
    for begin in range(0, numel, step):
        base, models = raw(begin, min(begin + step, numel))
        if not served(kept, [base, *models]):
            return None
        sums = np.zeros((-(-base.numel() // ROW), len(kept), 2))
        more = {Args.MEASURES: 1, Args.OUT: sums.ctypes.data}
        if not _run([base, *models], begin, kept, [1.0] * len(kept), (1.0, 1.0, 1.0), more):
            return None
        rows.append(sums)
    sums: Any = np.concatenate(rows) if rows else np.zeros((0, len(kept), 2))
    return [[math.fsum(column) for column in own] for own in sums.transpose(1, 2, 0)]


def _model(tensor: Tensor, kept: Kept) -> tuple[int, int, int, int, int]:
    """A row of integers, see `Model`."""
    by, key, limit = 0, 0, 0
    if isinstance(kept.by, Dropout) and kept.by.threshold < 1 << 63:
        by, key, limit = 1, ctypes.c_int64(kept.by.key).value, kept.by.threshold
    elif isinstance(kept.by, Trim):
        by, limit = 2, _EVERYWHERE if kept.by.stop is None else kept.by.stop
    return tensor.data_ptr(), KINDS[tensor.dtype], by, key, limit


def _run(
    tensors: Sequence[Tensor],
    begin: int,
    kept: Sequence[Kept],
    weights: Sequence[float],
    factors: Sequence[float],
    more: Mapping[Args, int],
) -> bool:
    """Whether all was finite. ``tensors``: the base, then the models."""
    from optx.kernels import cpu

    numel, stride = tensors[0].numel(), 4 * BLOCK * (4 + len(kept))
    room = np.empty(torch.get_num_threads() * stride + 64, np.uint8)
    rows = np.array([_model(*one) for one in zip(tensors, (Kept(), *kept), strict=True)], np.int64)
    sizes = [one.by.size if isinstance(one.by, Trim) else 0.0 for one in kept]
    scales = ((one.divisor, one.factor) for one in kept)
    numbers = np.array([(*s, w, size) for s, w, size in zip(scales, weights, sizes, strict=True)])
    shared, args = np.array([*factors, 0.0]), np.zeros(len(Args), np.int64)
    known = {
        **{Args.NUMEL: numel, Args.BEGIN: begin, Args.COUNT: len(kept), Args.STRIDE: stride},
        **{Args.MODELS: rows[1:].ctypes.data, Args.NUMBERS: numbers.ctypes.data},
        **{Args.FACTORS: shared.ctypes.data, Args.ROOM: -(-room.ctypes.data // 64) * 64},
    }
    for position, value in {**known, **more}.items():
        args[position] = value
    # Pieces are taken by threads of their own.
    cpu.run(_compiled().run.address, args.ctypes.data, numel > PIECE)
    return not shared[Factor.BAD]
