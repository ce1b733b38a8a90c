"""Exact order statistics of more numbers than fit in memory, by counting bit patterns in two passes.

A float32's bits, with the negative ones turned round, are integers in the same order as the numbers. The
first pass counts the upper 16 bits of all, which tells in which of 65,536 buckets the k-th number lies; the
second counts the lower 16 bits in that bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optx.kernels.available import why_unavailable

_FEW = 1 << 16  # so many numbers per row are sorted in memory, in one pass
_HALF = 1 << 15

Rows = Callable[[], Iterable[Sequence[Tensor]]]
"""Begins a pass: pieces of the rows, one tensor of any shape per row, the same numbers in every pass."""


def _loops() -> ModuleType | type[_TorchLoops]:
    return _compiled() if why_unavailable("numba") is None else _TorchLoops


class _TorchLoops:
    """The same counts by torch's operations, which take four times the memory of a piece."""

    @staticmethod
    def count_high(bits: Any, counts: Any) -> None:
        counts += torch.bincount((_keys(bits) >> 16) + _HALF, minlength=2 * _HALF).numpy()

    @staticmethod
    def count_low(bits: Any, bucket: int, counts: Any) -> None:
        keys = _keys(bits)
        counts += torch.bincount(keys[(keys >> 16) + _HALF == bucket] & 0xFFFF, minlength=1 << 16).numpy()


def _keys(bits: Any) -> Tensor:
    """Integers in the order of the numbers."""
    numbers = torch.from_numpy(bits)
    return numbers ^ ((numbers >> 31) & 0x7FFFFFFF)


@functools.cache
def _compiled() -> ModuleType:
    from optx.kernels.generated import load_module, source

    return load_module("delta_select", source("optx.delta", "_order_statistics_loops.py"))


def order_statistics(rows: Rows, ranks: Sequence[Sequence[int]], numel: int) -> list[list[float]]:
    """The numbers that would stand at given places if each row were sorted.

    Args:
        rows: gives the rows piece by piece, and is called twice at most. Numbers are compared as float32.
        ranks: for each row, places counted from 0, ascending.
        numel: numbers of one row.

    Returns:
        A number for each rank, exactly one of the row's.
    """
    if numel <= _FEW:
        return _sorted(rows, ranks)
    loops = _loops()
    counts = torch.zeros(len(ranks), 2 * _HALF, dtype=torch.int64)
    for pieces in rows():
        for row, piece in enumerate(pieces):
            loops.count_high(_bits(piece), counts[row].numpy())
    ends = counts.cumsum(1)
    # A rank's bucket, and its place among the bucket's own numbers.
    buckets = [[int(torch.searchsorted(ends[r], k, right=True)) for k in ks] for r, ks in enumerate(ranks)]
    within = [
        [k - int(ends[r, b] - counts[r, b]) for k, b in zip(ks, buckets[r], strict=True)]
        for r, ks in enumerate(ranks)
    ]
    lows = [{b: torch.zeros(1 << 16, dtype=torch.int64) for b in bs} for bs in buckets]
    for pieces in rows():
        for row, piece in enumerate(pieces):
            for bucket, low in lows[row].items():
                loops.count_low(_bits(piece), bucket, low.numpy())
    return [
        [_value(b, int(torch.searchsorted(lows[r][b].cumsum(0), k, right=True))) for b, k in found]
        for r, found in enumerate(zip(buckets[r], within[r], strict=True) for r in range(len(ranks)))
    ]


def _sorted(rows: Rows, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    flat = ([piece.reshape(-1).to("cpu", torch.float32) for piece in pieces] for pieces in rows())
    whole = [torch.cat(row).sort().values for row in zip(*flat, strict=True)]
    return [row[list(places)].tolist() for row, places in zip(whole, ranks, strict=True)]


def _bits(piece: Tensor) -> Any:
    return piece.reshape(-1).to("cpu", torch.float32).contiguous().view(torch.int32).numpy()


def _value(bucket: int, low: int) -> float:
    key = ((bucket - _HALF) << 16) | low
    bits = key ^ (0x7FFFFFFF if key < 0 else 0)
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
