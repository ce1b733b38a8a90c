"""ABMLL written out with whole matrices: normal weights, divergence, prior, a meta-step of first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gamma, Normal, kl_divergence
from torch.nn import functional as F

Pairs = Mapping[str, Tensor]  # A_mean, B_mean, A_std, B_std of a layer


class Layer(NamedTuple):
    """A frozen linear layer and c."""

    weight: Tensor
    bias: Tensor
    c: float


@dataclass
class Options:
    """As of `optx.ABMLL`."""

    beta: float
    gamma: float
    kind: str = "softplus"
    a0: float = 1.0
    b0: float | None = None


def weights(pairs: Pairs, c: float, kind: str = "softplus") -> Normal:
    """The distribution of the update."""
    raw = pairs["B_std"] @ pairs["A_std"]
    sigma = F.softplus(raw + math.log(math.expm1(c))) if kind == "softplus" else (raw + c).abs()
    return Normal(pairs["B_mean"] @ pairs["A_mean"], sigma.clamp_min(1e-6) if kind == "abs" else sigma)


def divergence(q: Pairs, p: Pairs, c: float, kind: str = "softplus") -> Tensor:
    return kl_divergence(weights(q, c, kind), weights(p, c, kind)).sum()


def surprise(pairs: Pairs, c: float, options: Options) -> Tensor:
    found, rate = weights(pairs, c, options.kind), options.a0 * c**2 if options.b0 is None else options.b0
    of_means = Normal(torch.zeros_like(found.mean), 1.0).log_prob(found.mean)
    shape, rate = (found.mean.new_tensor(value) for value in (options.a0, rate))
    of_precisions = Gamma(shape, rate).log_prob(found.stddev**-2)
    return -(of_means + of_precisions).sum()


def forward(x: Tensor, layers: Sequence[Layer], pairs: Sequence[Pairs]) -> Tensor:
    """Layers with tanh between them, by mean weights."""
    for i, (layer, one) in enumerate(zip(layers, pairs, strict=True)):
        x = F.linear(x.tanh() if i else x, layer.weight + weights(one, layer.c).mean, layer.bias)
    return x


def meta_gradient(
    layers: Sequence[Layer],
    theta: Sequence[Pairs],
    tasks: Sequence[tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], Tensor]],
    steps: int,
    lr: float,
    options: Options,
) -> list[dict[str, Tensor]]:
    """By theta's factors, the mean over tasks (loss and x of support, loss and x of query)."""
    total = [{name: torch.zeros_like(t) for name, t in one.items()} for one in theta]
    for support, x, query, z in tasks:
        fixed = [{name: t.detach() for name, t in one.items()} for one in theta]
        phi = [{name: t.clone().requires_grad_() for name, t in one.items()} for one in fixed]
        for _ in range(steps):
            loss = support(forward(x, layers, phi)) + options.beta * _kl(phi, fixed, layers, options)
            flat = iter(
                torch.autograd.grad(loss, [t for one in phi for t in one.values()], allow_unused=True)
            )
            phi = [{name: _down(t, next(flat), lr) for name, t in one.items()} for one in phi]
        own = [{name: t.clone().requires_grad_() for name, t in one.items()} for one in fixed]
        loss = query(forward(z, layers, phi)) + options.beta * _kl(phi, own, layers, options)
        prior = sum(surprise(one, layer.c, options) for one, layer in zip(own, layers, strict=True))
        loss = loss + options.gamma / len(tasks) * prior
        for by in (phi, own):
            flat = iter(
                torch.autograd.grad(
                    loss, [t for one in by for t in one.values()], allow_unused=True, retain_graph=True
                )
            )
            for one in total:
                for name in one:
                    grad = next(flat)
                    one[name] += 0 if grad is None else grad / len(tasks)
    return total


def _down(t: Tensor, grad: Tensor | None, lr: float) -> Tensor:
    return (t.detach() - (0 if grad is None else lr * grad)).requires_grad_()


def _kl(q: Sequence[Pairs], p: Sequence[Pairs], layers: Sequence[Layer], options: Options) -> Tensor:
    parts = [divergence(*pair, layer.c, options.kind) for *pair, layer in zip(q, p, layers, strict=True)]
    return torch.stack(parts).sum()
