"""Softmax of rows in torch operations: the path where no kernel serves, as on other devices.

The four functions are those of `cpu` and `pairs_triton`, argument by argument. A sum is given as these have
it, with the largest entry as the shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "fold", "softmax", "spread"]


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of ``dtype`` are computed with: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax(x: Tensor) -> Tensor:
    """Softmax of each row; see `optx.kernels.softmax.cpu.softmax`."""
    return torch.softmax(x, -1)


def fold(x: Tensor) -> Tensor:
    """Each row's sum of exponentials as (m, n, shift); see `optx.kernels.softmax.cpu.fold`."""
    x = x.to(math_dtype(x.dtype))
    shift = x.amax(-1)
    m = (x - shift[:, None]).exp_().sum(-1)
    return torch.stack([m, torch.zeros_like(m), shift], -1)


def spread(x: Tensor, sums: Tensor, scale: Tensor, labels: Tensor | None, lone: Tensor | None) -> Tensor:
    """``scale softmax(x)``, less ``lone`` at labels; see `optx.kernels.softmax.cpu.spread`."""
    m, n, shift = sums.unsqueeze(1).unbind(-1)
    y = ((x.to(sums.dtype) - shift) - n * 0.6931471805599453).exp_().mul_(scale[:, None] / m)
    y.masked_fill_(scale[:, None] == 0.0, 0.0)
    if labels is not None and lone is not None:
        y.scatter_add_(1, labels[:, None], -lone[:, None])
    return y.to(x.dtype)


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """Softmax's gradient, from that of its result; see `optx.kernels.softmax.cpu.backward`."""
    dtype = math_dtype(y.dtype)
    wide, grad = y.to(dtype), grad.to(dtype)
    return (wide * (grad - (wide * grad).sum(-1, keepdim=True))).to(y.dtype)
