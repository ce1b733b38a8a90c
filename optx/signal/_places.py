"""Where a loss lies among those of its batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places(losses: Tensor, counts: Tensor | None, delta: float) -> Tensor:
    """Where each loss lies between the least and the most of those that count: in [-delta, delta].

    Losses that differ by no more than 1e-6 (the authors' code divides by that at least), or than what their
    dtype can tell, are equal: all are at 0 exactly, whatever the strategy and the dtype.
    """
    if counts is None:
        low, high = losses.aminmax()
    else:
        low = torch.where(counts, losses, math.inf).amin()
        high = torch.where(counts, losses, -math.inf).amax()
    limits = torch.finfo(losses.dtype)
    if losses.device.type == "cpu":  # where numbers are at hand, and a tensor of one costs as much as a row
        low, high = float(low), float(high)
        least = min(max(limits.eps * max(abs(low), abs(high)), 1e-6), limits.max)
        if (spread := high - low) <= least:
            return torch.zeros_like(losses)
        return ((losses - low) + (losses - high)) * delta / spread
    spread = high - low
    least = (limits.eps * torch.maximum(low.abs(), high.abs())).clamp(1e-6, limits.max)
    h = ((losses - low) + (losses - high)) * delta / spread.clamp_min(1e-6)
    return torch.where(spread <= least, 0.0, h)
