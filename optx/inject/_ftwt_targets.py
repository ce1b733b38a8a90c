"""Which filters of a layer were worth computing for a sample, by what they gave: targets of predictors.

Source: FTWT, arXiv 2110.08232, section 3.2, and its official code (``utils/layers.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_DEAD = 1e-5
"""What counts as nothing: of a share of the mass, and in sums of shares."""


def channel_scores(y: Tensor) -> Tensor:
    """a_c = max |y_c| over all positions.

    Args:
        y: activations (B, C, H, W).

    Returns:
        (B, C) in float32, without a gradient.
    """
    y = y.detach()
    return torch.maximum(y.amax((-2, -1)), -y.amin((-2, -1))).float()


def mass_target(scores: Tensor, r: float, crossing: str = "drop") -> Tensor:
    """The filters that have the share r of a sample's mass, the largest first.

    Args:
        scores: (B, C), 0 or more.
        r: between 0 and 1; at 1 only filters with no more than 1e-5 of the mass are left out.
        crossing: what becomes of the filter with which the sum gets past r: ``"drop"`` it, as the official
            code does (all are dropped where the first has more than r by itself), or ``"keep"`` it.

    Returns:
        (B, C) bool, True for what is worth computing. A row of zeros has all of them.
    """
    share = scores / scores.sum(1, keepdim=True)
    if r == 1:
        return ~(share <= _DEAD)
    largest, order = share.sort(stable=True, dim=1, descending=True)
    total = largest.cumsum(1)
    beyond = total - r > _DEAD if crossing == "drop" else total - largest >= r - _DEAD
    return torch.ones_like(beyond).scatter(1, order, ~beyond)


def uniform_target(scores: Tensor, ratio: float) -> Tensor:
    """All filters but the ``int(ratio C)`` lowest of each sample, and those with no more than 1e-5.

    Args:
        scores: (B, C), 0 or more.
        ratio: share that is left out.

    Returns:
        (B, C) bool, True for what is worth computing.
    """
    lowest = scores.argsort(stable=True, dim=1)[:, : int(ratio * scores.shape[1])]
    return (scores > _DEAD).scatter(1, lowest, value=False)
