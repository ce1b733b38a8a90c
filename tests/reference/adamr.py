"""AdamR (arXiv 2410.09344 and the official ``AdamR.py``), with r taken directly from all v-hats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_scale(v_hats: Sequence[Tensor]) -> float:
    """The root mean square over every element of every tensor; 1 if that is 0."""
    count = sum(v.numel() for v in v_hats)
    total = sum(float(v.sum()) for v in v_hats)
    return (total / count) ** 0.5 or 1.0 if count else 1.0


def pull(w: Tensor, anchor: Tensor, rate: float, norm: str) -> Tensor:
    """The weight after the decay towards its anchor."""
    away = w - anchor
    return w - rate * (away if norm == "l2" else torch.sign(away))
