"""Sums and differences of weights, in float32 at least and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def add(tensor: Tensor, change: Tensor, scale: float = 1.0) -> Tensor:
    """tensor + scale * change, summed in the wider precision and rounded once to the tensor's dtype."""
    within = torch.promote_types(tensor.dtype, torch.float32)
    summed = tensor.to(within, copy=True).add_(change.to(tensor.device, within), alpha=scale)
    return summed.to(tensor.dtype)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """after - before in the wider of both precisions, float32 at least."""
    within = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    before = before.to(after.device, within)
    return after - before if after.dtype == within else after.to(within).sub_(before)


def total(tensors: list[Tensor]) -> Tensor:
    """Of one change or two, on the first one's device."""
    return tensors[0] if len(tensors) == 1 else tensors[0] + tensors[1].to(tensors[0].device)


def difference_dtype(dtype: torch.dtype) -> torch.dtype:
    """What differences of a dtype are computed in; integers have none."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
