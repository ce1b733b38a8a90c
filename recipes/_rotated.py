"""Digits turned by six angles, the network that reads them, and CORAL's penalty."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._handwriting import handwriting
from ._run import device

ANGLES = (0, 15, 30, 45, 60, 75)
Domain = tuple[Tensor, Tensor]


def turned(x: Tensor, degrees: float) -> Tensor:
    """Images turned about their middle, by linear interpolation; what comes in from outside is black."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    cos, sin, zero = angle.cos(), angle.sin(), torch.tensor(0.0)
    matrix = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def load(seed: int) -> tuple[list[Domain], list[Domain]]:
    """By angle, four fifths of its digits and the rest; every digit is in one domain."""
    x, y = handwriting()
    parts = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).chunk(len(ANGLES))
    whole = [(turned(x[i], a).to(device()), y[i].to(device())) for a, i in zip(ANGLES, parts, strict=True)]
    cut = len(parts[-1]) * 4 // 5
    return [(x[:cut], y[:cut]) for x, y in whole], [(x[cut:], y[cut:]) for x, y in whole]


def network() -> nn.Sequential:
    """Two convolutions and two linear layers; the last one's inputs are the features."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def coral(features: Sequence[Tensor]) -> Tensor:
    """Mean squared differences of means and covariances, over all pairs of domains."""
    moments = [(f.mean(0), f.T.cov()) for f in features]
    apart = [(a - b).square().mean() + (c - d).square().mean() for (a, c), (b, d) in combinations(moments, 2)]
    return torch.stack(apart).mean()


@torch.no_grad()
def accuracy(model: nn.Module, domains: Sequence[Domain]) -> float:
    """Share of digits that are read right."""
    x, y = (torch.cat(part) for part in zip(*domains, strict=True))
    return float((model(x).argmax(1) == y).float().mean())
