"""The sub-gradient method as the paper has it, term by term in loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def subgradient(A: Tensor, y: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Q = mean sign(residual) A_i, and D = (Q + Q^T) U."""
    Q = torch.zeros_like(A[0])
    for A_i, y_i in zip(A, y, strict=True):
        residual = float((A_i * (U @ U.t())).sum() - y_i)
        Q = Q + math.copysign(1.0, residual) * (residual != 0) * A_i / len(y)
    return Q, (Q + Q.t()) @ U


def loss(A: Tensor, y: Tensor, U: Tensor) -> float:
    return sum(abs(float((a * (U @ U.t())).sum() - b)) for a, b in zip(A, y, strict=True)) / len(y)


def run(A: Tensor, y: Tensor, U: Tensor, eta0: float, rho: float, steps: int, mode: str) -> Tensor:
    for t in range(steps):
        Q, D = subgradient(A, y, U)
        eta = eta0 * loss(A, y, U) if mode == "polyak" else eta0 * rho**t / float(Q.norm())
        U = U - eta * D
    return U
