"""Loops over domains that DSPReg's tests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optx


def give(opt: optx.Wrapped, params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]]) -> None:
    """One step's domains, called 0, 1, ...; each has these gradients, None where a parameter is unused."""
    for d, grads in enumerate(gradients):
        with opt.dsp_reg.domain(d):
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else g.clone()


def one(values: Sequence[Sequence[float]], w: Sequence[float], fused: Any = False, **options: Any) -> Any:
    """A vector that SGD steps with lr 1, its domains' gradients given; the optimizer and the weight."""
    p = nn.Parameter(torch.tensor(w))
    dsp = optx.DSPReg(len(values), min_dim=0, **options)
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), dsp, fused=fused)
    give(opt, [p], [[torch.tensor(v)] for v in values])
    return opt, p


def net(seed: int = 0) -> nn.Sequential:
    """A small model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(step: int, d: int) -> tuple[Tensor, Tensor]:
    """One domain's data."""
    g = torch.Generator().manual_seed(100 * step + d)
    x = torch.randn(8, 4, generator=g)
    return x * (d + 1), (x[:, 0] > 0.1 * d).long() + (x[:, 1] > 0).long()


def loss_of(model: nn.Module, step: int, d: int) -> Tensor:
    """Its loss."""
    x, y = batch(step, d)
    return nn.functional.cross_entropy(model(x).float(), y)


def train(model: nn.Module, opt: optx.Wrapped, steps: Iterable[int], domains: int = 3) -> None:
    """An ordinary loop."""
    for step in steps:
        opt.zero_grad()
        for d in range(domains):
            with opt.dsp_reg.domain(d):
                loss_of(model, step, d).backward()
        opt.step()


def wrapped(model: nn.Module, lr: float = 0.05, fused: Any = "auto", **options: Any) -> optx.Wrapped:
    """SGD with momentum, three domains."""
    base = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9)
    return optx.wrap(base, optx.DSPReg(3, **options), fused=fused)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
