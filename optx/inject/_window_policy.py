"""Which windows are kept: the predictor, the straight-through draw, and policies that go down a stage.

Source: AdaWPT, arXiv 2306.14268 (LMD-ViT), section 3.2, and the authors' ``model_hw.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx.inject._window_grid import Grid

KEEP = 0
"""The index of "keep" (blurry) among the two logits."""


class Predictor(nn.Module):
    """Two logits a token, from itself and from the mean of the whole image: (B, H, W, C) to (B, H, W, 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, dim))
        half, quarter = max(1, dim // 2), max(1, dim // 4)
        self.score = nn.Sequential(
            nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of the block's input, before its norm."""
        first: Any = self.embed[0]
        h = self.embed(x.to(first.weight.dtype))
        local, whole = h.split([h.shape[-1] // 2, h.shape[-1] - h.shape[-1] // 2], dim=-1)
        whole = whole.mean((1, 2), keepdim=True).expand(*h.shape[:-1], -1)
        return self.score(torch.cat([local, whole], dim=-1))


def draw(logits: Tensor, tau: float) -> Tensor:
    """D of every window (n,), 0 or 1, drawn; backward it is the softmax of (logits + noise) / tau.

    The noise is of torch's own stream, as dropout's. In two classes the larger share is at least a half, so
    that 1 - y + y is exactly 1.
    """
    return F.gumbel_softmax(logits, tau=tau, hard=True)[:, KEEP]


def threshold(logits: Tensor) -> Tensor:
    """D of every window (n,) in inference: 1 where "keep" has more than half."""
    return (logits[:, KEEP] > logits[:, 1 - KEEP]).to(logits.dtype)


class Chain:
    """The policy that goes down the plain or the shifted blocks of one stage, in one forward."""

    def __init__(self) -> None:
        self.policy: Tensor | None = None
        self.grid: Grid | None = None
        self.task = -1
        """The backward pass in which a checkpoint computed it again; -1: the forward."""

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": None, "grid": None, "task": -1}  # a copy has computed nothing

    def clear(self) -> None:
        """Before a forward."""
        self.policy = self.grid = None

    def go_on(self, policy: Tensor, grid: Grid, *, first: bool, task: int) -> Tensor:
        """A block's own policy after what the chain has dropped already."""
        if not first and self.policy is not None:
            policy = policy * self.policy
        self.policy, self.grid, self.task = policy, grid, task
        return policy
