"""Matrices of a given rank whose other singular values are alike, so that a rank is no matter of rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(rows: int, columns: int, rank: int, draws: torch.Generator) -> Tensor:
    """(rows, columns) float64, of this rank or as much as fits."""
    rank = min(rank, rows, columns)
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=draws).double())[0] for k in (rows, columns))
    return left[:, :rank] @ right[:, :rank].T
