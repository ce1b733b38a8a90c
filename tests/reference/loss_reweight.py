"""Loss reweighting in plain Python, sample by sample, as the spec's five steps say it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def weights(
    losses: Sequence[float], strategy: str, r: float, delta: float = 1.0, alpha: float = 1.0
) -> list[float]:
    low, high = min(losses), max(losses)
    spread = max(high - low, 1e-6)
    worth = []
    for loss in losses:
        h = delta * (2 * loss - low - high) / spread
        worth.append(
            {
                "linupper": min(h + delta, alpha * delta),
                "quadratic": 1 - h**2 / delta**2,
                "extremes": abs(h),
                "upper": (h + delta) / 2,
                "uniform": 0.0,
            }[strategy]
        )
    parts = [math.exp((f - max(worth)) / r) for f in worth]
    return [part / sum(parts) for part in parts]


def capped(weights: Sequence[float], limit: float) -> list[float]:
    """The factor for those below the limit, by bisection: each gets min(factor * w, limit / M)."""
    top = limit / len(weights)
    low, high = 1.0, 1e60
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if sum(min(middle * w, top) for w in weights) > 1 else (middle, high)
    return [min(high * w, top) for w in weights]
