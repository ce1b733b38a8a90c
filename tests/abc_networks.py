"""Networks written down from their exponents, layer by layer, and trained as those say: dumb and separate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Written(nn.Module):
    """``f(x) = n^-a w act(... act(n^-a_1 w_1 x))`` with entries of standard deviation n^-b, no biases."""

    def __init__(self, exponents, width, inputs=6, outputs=1, seed=0, act=torch.tanh, dtype=torch.float32):
        super().__init__()
        sizes = [inputs, *[width] * exponents.hidden, outputs]
        draws = torch.Generator().manual_seed(seed)
        self.act, self.exponents, self.width = act, exponents, width
        self.w = nn.ParameterList(
            torch.randn(rows, columns, generator=draws, dtype=torch.float64).to(dtype) * width ** -float(b)
            for columns, rows, b in zip(sizes[:-1], sizes[1:], exponents.b, strict=True)
        )

    def features(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of all layers, the output last."""
        found: list[Tensor] = []
        for layer, (w, a) in enumerate(zip(self.w, self.exponents.a, strict=True)):
            x = (self.act(x) if layer else x) @ (w * self.width ** -float(a)).T
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Of the family that the exponents are for; Adam without what keeps its steps from being signs."""
        groups = [
            {"params": [w], "lr": lr * self.width ** -float(c)}
            for w, c in zip(self.w, self.exponents.c, strict=True)
        ]
        if self.exponents.optimizer == "sgd":
            return torch.optim.SGD(groups)
        return torch.optim.Adam(groups, eps=1e-30)


def batch(rows=12, inputs=6, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(99)
    x = torch.randn(rows, inputs, generator=draws, dtype=torch.float64).to(dtype)
    return x, torch.sin(2 * x[:, :1]) + x[:, 1:2]


def train(model: Written, lr: float, steps: int, x: Tensor, y: Tensor) -> None:
    optimizer = model.optimizer(lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean()).backward()
        optimizer.step()


def slope(widths, values) -> float:
    """Of the logarithms, by least squares."""
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
