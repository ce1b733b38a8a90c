"""A small model with ABMLL on both of its layers, tasks for it, and its loop: for the tests of ABMLL."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx

Data = tuple[Tensor, Tensor]


def mlp(
    dtype: torch.dtype = torch.float64, moved: bool = True, **options: Any
) -> tuple[Any, optx.ABMLLHandle]:
    """The model, and its handle, with theta away from its start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    ab = optx.attach(model, optx.ABMLL(**{"rank": 2, "c": 0.05, **options}), nn.Linear)
    if moved:
        move(ab)
    return model, ab


def move(ab: optx.Handle, seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ab.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))


@functools.cache
def data(number: int, dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[Data, Data]:
    """A task's support and query sets."""
    g = torch.Generator().manual_seed(number)
    x = torch.randn(2 * size, 5, generator=g).to(dtype)
    y = torch.randint(3, (2 * size,), generator=g)
    return (x[:size], y[:size]), (x[size:], y[size:])


def nll(model: nn.Module, of: Data) -> Tensor:
    return F.cross_entropy(model(of[0]), of[1])


def meta(
    model: Any, ab: optx.ABMLLHandle, numbers: Any = (0,), query: Any = None, scale: float = 1.0, **task: Any
) -> None:
    """Adds theta's gradient over some tasks; ``query`` computes the outer loss."""
    dtype = next(model.parameters()).dtype
    task = {"inner_steps": 2, "inner_lr": 0.5, "tasks": len(numbers), **task}
    for number in numbers:
        support, asked = data(number, dtype)
        with ab.task(**task) as t:
            t.adapt(lambda support=support: nll(model, support))  # type: ignore[misc]
            (scale * t.outer(nll(query or model, asked))).backward()


def grads(ab: optx.Handle) -> dict[str, Tensor]:
    """theta's gradients, which are then None again."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ab.named_parameters()}
    for p in ab.parameters():
        p.grad = None
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())
