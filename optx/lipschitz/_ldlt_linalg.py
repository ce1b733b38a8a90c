"""torch.linalg with types: triangular solves and Cholesky factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_torchs: Any = torch.linalg


def solve_triangular(P: Tensor, B: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """P^{-1} B, or B P^{-1} where it is not ``left``."""
    return _torchs.solve_triangular(P, B, upper=upper, left=left)


def cholesky(G: Tensor) -> Tensor:
    """The lower factor; raises where there is none."""
    return _torchs.cholesky(G)


def cholesky_ex(G: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, and 0 where there is one."""
    return tuple(_torchs.cholesky_ex(G))


def norm(A: Tensor) -> float:
    """The largest singular value."""
    return float(_torchs.matrix_norm(A, 2))


def least_eigenvalue(symmetric: Tensor) -> float:
    """The least eigenvalue of a symmetric matrix."""
    return float(_torchs.eigvalsh(symmetric)[0])
