"""Sums over samples and positions that a layer's basis is made of, and its eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.interaction._passes import wide


class Gram:
    """G = F^T F / n of rows that come batch by batch, about their mean or about 0, in float64.

    Args:
        centre: whether it is about the mean.
    """

    def __init__(self, centre: bool) -> None:
        self.centre, self.n = centre, 0
        self._first = torch.empty(0)  # the first batch's mean: sums about it lose nothing to a large mean
        self._sum = torch.empty(0)
        self._square = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """(n, d) float64."""
        if not len(rows):
            return
        if not self.n:
            zeros = rows.new_zeros(rows.shape[1])
            self._first = rows.mean(0) if self.centre else zeros
            self._sum, self._square = zeros, rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._first if self.centre else rows
        self._sum = self._sum + rows.sum(0)
        self._square += rows.T @ rows
        self.n += len(rows)

    @property
    def matrix(self) -> Tensor:
        """G, (d, d)."""
        found = self._square / self.n
        if self.centre:
            rest = self._sum / self.n
            found = found - torch.outer(rest, rest)
        return found

    @property
    def mean(self) -> Tensor:
        """(d,); zeros where it is about 0."""
        return self._first + self._sum / self.n if self.centre else torch.zeros_like(self._sum)


class Moment:
    """Jacobian second moment M' = sum over samples and positions of J^T J / n, in float64."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, gradient: Tensor, kept: Tensor | None) -> None:
        """One v^T J, (B, ..., d)."""
        g = wide(gradient.flatten(0, -2) if kept is None else gradient[kept])
        self._sum = g.T @ g if self._sum is None else self._sum + g.T @ g

    def matrix(self, n: int, like: Tensor) -> Tensor:
        """M', (d, d); zeros if the target has no feature."""
        return torch.zeros_like(like) if self._sum is None else self._sum / n


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues from the largest, those below 0 (rounding) as 0, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Those alone, which takes a third of the time."""
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).clamp_min(0)


def rank(values: Tensor, eps: float) -> int:
    """How many eigenvalues, from the largest, are above eps times that."""
    return int((values > eps * values[:1]).sum()) if values.numel() else 0


@dataclass(frozen=True)
class Solved:
    """A basis from the two moments: C, its inverse on the data, Lambda and both ranks."""

    C: Tensor
    C_pinv: Tensor
    Lambda: Tensor
    rank_gram: int
    rank_jacobian: int


def solve(gram: Tensor, moment: Tensor, eps: float) -> Solved:
    """The basis in which the Gram matrix is diag(Lambda) and the Jacobian second moment the identity.

    Args:
        gram: G, (d, d).
        moment: M', (d, d).
        eps: eigenvalues up to this share of the largest are taken as 0.
    """
    D, U, r_G = _above(gram, eps)
    R, R_pinv = U / D.sqrt(), D.sqrt()[:, None] * U.T  # whitening, and its inverse on the data
    Lambda, V, _ = _above(R_pinv @ moment @ R_pinv.T, eps)
    C, C_pinv = R @ V * Lambda.sqrt(), V.T @ R_pinv / Lambda.sqrt()[:, None]
    signs = _signs(C)
    return Solved(C * signs, C_pinv * signs[:, None], Lambda, r_G, rank(eigenvalues(moment), eps))


def _above(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """The eigenvalues that count, their eigenvectors, and how many they are."""
    values, vectors = eigen(matrix)
    count = rank(values, eps)
    return values[:count], vectors[:, :count], count


def _signs(C: Tensor) -> Tensor:
    """Such that each column's entry of the largest magnitude becomes positive."""
    if not C.numel():
        return C.new_ones(C.shape[1])
    largest = C.gather(0, C.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(C)


def check_finite(owner: str, path: str, *matrices: Tensor) -> None:
    """Raise if a layer's sums are no numbers."""
    if not all(bool(matrix.isfinite().all()) for matrix in matrices):
        raise OptxError(f"{owner}: activations or derivatives at {path!r} have inf or nan.")
