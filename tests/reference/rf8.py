"""RF8 as its authors have it, in float64, where log2 of no float32 comes near to a half; and its bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def power(w: Tensor) -> Tensor:
    """The exponent of the power of two that is nearest in log2, ties to even; -inf of 0."""
    return torch.round(torch.log2(w.double().abs()))


def quantise(w: Tensor) -> Tensor:
    """Two signed powers of two, float64."""
    wide = w.double()
    first = power(wide)
    d1 = wide.sign() * torch.exp2(first)
    rest = wide - d1
    second = power(rest)
    d2 = rest.sign() * torch.exp2(second)
    return torch.where(wide == 0, 0.0, torch.where(first - second <= 4, d1 + d2, d1))


MULTIPLIERS = (3 / 4, 7 / 8, 15 / 16, 1.0, 17 / 16, 9 / 8, 5 / 4, 3 / 2)


def value(code: int, e_max: int) -> float:
    """What a byte means."""
    exponent = code >> 3 & 15
    size = MULTIPLIERS[code & 7] * 2.0 ** (e_max - 15 + exponent) if exponent else 0.0
    return -size if code >= 128 else size


def packed(w: Tensor, e_max: int) -> Tensor:
    """What becomes of numbers in 15 octaves: rounded, and small ones to 0 or the smallest, float64."""
    made = quantise(w)
    least = 0.75 * 2.0 ** (e_max - 14)
    small = torch.where(w.double().abs() < least / 2, 0.0, least) * w.double().sign()
    return torch.where(made.abs() < least, small, made)


def every_bfloat16() -> Tensor:
    """All finite ones."""
    bits = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(torch.bfloat16)
    return bits[bits.isfinite()]


def every_float16() -> Tensor:
    """All finite ones."""
    bits = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(torch.float16)
    return bits[bits.isfinite()]
