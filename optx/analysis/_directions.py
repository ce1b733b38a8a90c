"""Lengths and angles of tensors seen as vectors, also where squares of their numbers would underflow."""

from __future__ import annotations

import torch
from torch import Tensor

from optx._names import whole


def norm(x: Tensor) -> Tensor:
    """L2 norm; a scalar, float32 or 64. Squares of small numbers don't underflow."""
    unit, scale = _unit_scale(x)
    return scale * whole(unit.square().sum()).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two tensors seen as vectors; 0 if either is 0. A scalar, float32 or 64."""
    (a, _), (b, _) = _unit_scale(a), _unit_scale(b)
    dot, aa, bb = (whole((x * y).sum()) for x, y in ((a, b), (a, a), (b, b)))
    length = aa.sqrt() * bb.sqrt()
    return torch.where(length == 0, torch.zeros_like(dot), (dot / length).clamp(-1.0, 1.0))


def _unit_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` over its largest magnitude, and that magnitude, in float32 or wider.

    Squares of collapsed gradients (1e-25) would underflow.
    """
    if x.layout != torch.strided:
        x = x.to_dense()
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.numel() == 0:
        return torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = whole(x.abs().amax())
    return x / torch.where(largest == 0, torch.ones_like(largest), largest), largest
