"""A small network for SaRA's tests, and how its steps are taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import optx

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def net(seed: int = 0, width: int = 24, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same weights every time; the norm's gains are 1."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width)).to(
        dtype
    )


def loss(model: nn.Module, step: int = 0) -> Tensor:
    """Of the outputs' size, on another batch in each step."""
    x = X.roll(step, 1).to(next(model.parameters()).dtype)
    return (model(x) - x[:, :1]).square().mean().float()


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """An ordinary loop."""
    for step in steps:
        opt.zero_grad()
        loss(model, step).backward()
        opt.step()


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    """With names."""
    return torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=0.1, **options)


def wrapped(model: nn.Module, **options: Any) -> optx.Wrapped:
    """AdamW and SaRA, with a fifth of the entries where nothing else is said."""
    chosen = {} if "threshold" in options else {"fraction": 0.2}
    return optx.wrap(adamw(model), optx.SaRA(**chosen | options))


def copies(model: nn.Module) -> dict[str, Tensor]:
    """All weights, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def masks(opt: Any, model: nn.Module) -> dict[str, Tensor]:
    """What is selected, by name."""
    return {name: opt.sara._mask(p) for name, p in model.named_parameters()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
