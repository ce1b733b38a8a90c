"""A small model with two tuned hyperparameters, and its loop: for the tests of self-tuning networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx


def mlp(rate: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(rate), nn.Linear(12, 3))


def tuned(model: nn.Module, **options: Any) -> optx.SelfTuning:
    hparams = optx.HParams(drop=optx.hp(0.2, (0, 0.9)), noise=optx.hp(0.1, (0, None)))
    return optx.attach(model, optx.STN(hparams, **{"dropout": "drop", "warmup": 0, **options}))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return torch.randn(size, 6, generator=draws), torch.randint(3, (size,), generator=draws)


def noisy(stn: optx.SelfTuning, x: Tensor) -> Tensor:
    """Augmentation at the strength of each example."""
    return x + stn.hparams["noise"].value.view(-1, 1) * torch.randn_like(x)


def train_step(model: nn.Module, stn: optx.SelfTuning, opt: torch.optim.Optimizer, step: int) -> None:
    x, y = batch(step)
    with stn.train_batch(x):
        F.cross_entropy(model(noisy(stn, x)), y).backward()
    opt.step()
    opt.zero_grad()


def valid_step(model: nn.Module, stn: optx.SelfTuning, step: int) -> None:
    x, y = batch(1000 + step)
    with stn.valid_batch(x):
        F.cross_entropy(model(x), y).backward()
    stn.step_hparams()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def frozen(stn: optx.SelfTuning) -> tuple[Tensor, Tensor]:
    return stn.hparams.raw.detach().clone(), stn.hparams.raw_sigma.detach().clone()
