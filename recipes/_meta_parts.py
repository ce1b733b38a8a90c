"""What the meta recipe learns: tasks of sine curves, and of telling two of Shakespeare's plays apart."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _assets
from ._run import device

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Examples:
    """What a model is called with, and what it is to say."""

    inputs: Inputs
    target: Tensor


@dataclass(frozen=True)
class Domain:
    """Tasks of one kind, and the frozen model that adapters learn them with.

    Attributes:
        model: makes one, the same for all arms of a seed.
        targets: the modules that adapters are attached to.
        task: support and query set of a task, by its number.
        loss: of outputs.
        defaults: rank, rates, and how many tasks there are.
    """

    model: Callable[[], nn.Module]
    targets: str
    task: Callable[[int], tuple[Examples, Examples]]
    loss: Callable[[Tensor, Tensor], Tensor]
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])


def loss_of(domain: Domain, model: nn.Module, examples: Examples) -> Tensor:
    """The mean over examples."""
    return domain.loss(model(*examples.inputs), examples.target)


# ---- sine curves ------------------------------------------------------------------------------------


def curves(seed: int, support: int = 10, query: int = 20) -> Domain:
    """y = a sin(x + b), a in [0.5, 2] and b in [0, pi], on [-5, 5]; the network has learnt their mean."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(device())
    optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
    x = torch.linspace(-5, 5, 200, device=device())[:, None]
    for _ in range(600):
        optimizer.zero_grad()
        F.mse_loss(base(x), 2.5 / math.pi * x.cos()).backward()  # the mean over a and b
        optimizer.step()

    def task(number: int) -> tuple[Examples, Examples]:
        g = torch.Generator().manual_seed(number)
        a, b = 0.5 + 1.5 * torch.rand((), generator=g), math.pi * torch.rand((), generator=g)
        x = 10 * torch.rand(support + query, 1, generator=g) - 5
        x, y = x.to(device()), (a * (x + b).sin()).to(device())
        return Examples((x[:support],), y[:support]), Examples((x[support:],), y[support:])

    return Domain(lambda: copy.deepcopy(base), "2", task, F.mse_loss)
