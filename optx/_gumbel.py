"""Draws of the Gumbel distribution, which samples categories by an argmax and smooths them by a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gumbel(
    shape: Sequence[int],
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent draws g = -ln(-ln u), u uniform on (0, 1), of the given shape.

    They are drawn as -ln of an exponential variable: -ln(-ln u) is infinite where u rounds to 1, which in
    float32 happens once in 2^25 draws. Half precisions are refused: their tails end at a few units.
    Several generators are one for each entry of the first axis.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gumbel: dtype is {dtype}; it must be torch.float32 or torch.float64.")
    waits = torch.empty(tuple(shape), dtype=dtype, device=device)
    if isinstance(generator, Sequence):
        for row, own in zip(waits, generator, strict=True):
            row.exponential_(generator=own)
    else:
        waits.exponential_(generator=generator)
    return -waits.clamp_min(torch.finfo(dtype).tiny).log()
