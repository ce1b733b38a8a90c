"""Small policies and critics for the tests of `optx.PMOEHead` and its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import optx


class Policy(nn.Module):
    """A trunk of two layers, and the Linear that gives means, or means and log-deviations."""

    def __init__(self, states: int = 3, outputs: int = 4, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(states, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.out = nn.Linear(width, outputs, bias)

    def forward(self, states: Tensor) -> Any:
        return self.out(self.trunk(states))


class Q(nn.Module):
    """A critic of states and actions."""

    def __init__(self, states: int = 3, actions: int = 2, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(states + actions, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([states, actions], -1))


def policy(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    outputs: int = 4,
    head_outputs: Any = "mean_log_std",
    **options: Any,
) -> tuple[Any, optx.PMOEHandle]:
    """One with a head, away from its start."""
    torch.manual_seed(seed)
    model = Policy(outputs=outputs).to(dtype)
    handle = optx.attach(
        model, optx.PMOEHead(**{"init": 0.7, "outputs": head_outputs, **options}), targets="out"
    )
    return model, handle


def states(count: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(5)).to(dtype)
