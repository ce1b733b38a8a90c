"""Wanda and SparseGPT written out in NumPy, in float64, as slowly as the papers say them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


def lowest(scores: NDArray[np.float64], count: int) -> Mask:
    """Where the lowest of a row of numbers are; of equals the first."""
    found = np.zeros(scores.size, dtype=bool)
    found[np.argsort(scores, kind="stable")[:count]] = True
    return found


def wanda(
    W: Matrix, X: Matrix, sparsity: float, groups: tuple[int, int] | None = None, layer: bool = False
) -> Mask:
    """Which weights go: W (out, in), X (tokens, in)."""
    score = np.abs(W) * np.sqrt((X**2).sum(0))
    if layer:
        return lowest(score.ravel(), int(W.size * sparsity)).reshape(W.shape)
    gone = np.zeros(W.shape, dtype=bool)
    for i in range(W.shape[0]):
        if groups is None:
            gone[i] = lowest(score[i], int(W.shape[1] * sparsity))
        else:
            n, m = groups
            for j in range(0, W.shape[1], m):
                gone[i, j : j + m] = lowest(score[i, j : j + m], n)
    return gone


def sparsegpt(
    W: Matrix,
    X: Matrix,
    sparsity: float,
    groups: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Mask, Matrix]:
    """Which weights go, and the new weights; the inverse formed, every column updating all that follow."""
    W = W.copy()
    H = X.T @ X
    dead = np.diag(H) == 0
    H[dead, dead] = H.trace() / max(1, (~dead).sum()) or 1
    W[:, dead] = 0
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    gone = np.zeros(W.shape, dtype=bool)
    rows, width = W.shape
    taken = 0
    for j in range(width):
        if groups is not None and j % groups[1] == 0:
            n, m = groups
            for i in range(rows):
                gone[i, j : j + m] = lowest(W[i, j : j + m] ** 2 / np.diag(U)[j : j + m] ** 2, n)
        if groups is None and j % block == 0:
            stop = min(j + block, width)
            score = W[:, j:stop] ** 2 / np.diag(U)[j:stop] ** 2
            count = int(rows * stop * sparsity) - taken
            taken += count
            gone[:, j:stop] = lowest(score.ravel(), count).reshape(score.shape)
        error = np.where(gone[:, j], W[:, j], 0) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
        W[gone[:, j], j] = 0
    return gone, W
