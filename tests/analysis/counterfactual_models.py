"""Small classifiers that the tests of counterfactuals share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network(features: int = 4, classes: int = 2, seed: int = 0) -> nn.Sequential:
    """A smooth one, whose decisions bend; gives logits."""
    g = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(1.5 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
        # As many points of the unit cube in the one class as in the other.
        middle = made(examples(features))
        made[2].bias -= middle.median(0).values
    return made


def examples(features: int = 4, rows: int = 200, seed: int = 1) -> Tensor:
    """Points of the unit cube."""
    return torch.rand(rows, features, generator=torch.Generator().manual_seed(seed))


def linear(w: Tensor, b: float):
    """m(x) = w x + b, one number a row."""
    return lambda x: x @ w.to(x.dtype) + b
