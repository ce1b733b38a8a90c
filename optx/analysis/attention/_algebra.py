"""The linear algebra that the solvers need, with types."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_linalg: Any = torch.linalg


class Svd(NamedTuple):
    """U (p, k), S (k,) and Vᵀ (k, q)."""

    U: Tensor
    S: Tensor
    Vt: Tensor

    def with_values(self, S: Tensor) -> Tensor:
        """The matrix that has other singular values."""
        return (self.U * S) @ self.Vt


def svd(M: Tensor) -> Svd:
    """Singular vectors and values."""
    return Svd(*_linalg.svd(M, full_matrices=False))


def singular_values(M: Tensor) -> Tensor:
    """Falling."""
    return _linalg.svdvals(M)


def nuclear(M: Tensor) -> float:
    """The sum of the singular values."""
    return float(singular_values(M).sum())


def spectral(M: Tensor) -> float:
    """The largest singular value."""
    return float(singular_values(M)[0])


def length(x: Tensor) -> float:
    """The Frobenius norm, or a vector's."""
    return float(_linalg.vector_norm(x))


def lengths(rows: Tensor) -> Tensor:
    """(R, 1): each row's norm."""
    return _linalg.vector_norm(rows, dim=1, keepdim=True)


def span(rows: Tensor) -> Tensor:
    """Orthonormal columns whose span has all of these rows; all axes where rows are as many."""
    if len(rows) >= rows.shape[1]:
        return torch.eye(rows.shape[1], dtype=rows.dtype)
    return _linalg.qr(rows.T)[0]


def triangle(columns: Tensor) -> Tensor:
    """R of Q R: the columns' inner geometry, in as few numbers."""
    return _linalg.qr(columns)[1]


def inverse(H: Tensor) -> Tensor:
    """Of a regular matrix."""
    return _linalg.inv(H)


def solve(H: Tensor, c: Tensor) -> Tensor:
    """x with H x = c, H positive semidefinite; the shortest of least squares where it is singular."""
    factor, failed = _linalg.cholesky_ex(H)
    if int(failed):
        return _linalg.lstsq(H, c[:, None], driver="gelsd").solution[:, 0]
    return torch.cholesky_solve(c[:, None], factor)[:, 0]
