"""LSSA and LSSAR as the paper writes them (arXiv 2501.13428), one row and one key at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, seen: Tensor, power: float | None) -> Tensor:
    """The weights of one head, (T, S).

    Args:
        q: (T, d).
        k: (S, d).
        seen: bool (T, S).
        power: p; None: LSSA.
    """
    q, k = q.detach().double(), k.detach().double()
    found = torch.zeros(seen.shape, dtype=torch.float64)
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if seen[i, j]]
        n = len(keys)
        if not n:
            continue
        scale = math.log(q.shape[1]) * math.log(n)
        a = [math.log1p(math.exp(scale * cosine(q[i], k[j]))) for j in keys]
        a = [one / sum(a) for one in a]
        b = a
        if power is not None:
            offset = 0.0 if n <= 3 else 1.0
            b = [max(n * one - offset, 0.0) ** power if n * one > offset else 0.0 for one in a]
            b = [one / sum(b) for one in b]
        for j, one in zip(keys, b, strict=True):
            found[i, j] = one
    return found


def cosine(x: Tensor, y: Tensor) -> float:
    """Of two vectors; 0 if one is zero."""
    lengths = float(x.norm() * y.norm())
    return float(x @ y) / lengths if lengths else 0.0
