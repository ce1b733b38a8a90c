"""A multilayer perceptron in muP, written by hand, and the same with one layer out of scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = [64, 128, 256, 512]
HIDDEN = ("2.weight", "4.weight")


class Readout(nn.Linear):
    """Table 8's: the input is divided by the width's ratio."""

    def __init__(self, width: int, m: float) -> None:
        super().__init__(width, 3)
        self.m = m
        with torch.no_grad():
            self.weight.mul_(m**0.5)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.m)


def mlp(width: int, family: str = "adam", zero: bool = False) -> tuple[nn.Sequential, dict[str, float]]:
    """muP by hand, and each parameter's learning rate."""
    m = width / 64
    model = nn.Sequential(
        *(nn.Linear(8, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()),
        Readout(width, m),
    )
    with torch.no_grad():
        for i in (2, 4):
            model[i].bias.mul_(m**0.5)
        if zero:
            model[7].weight.zero_()
    hidden, other = (1 / m, 1.0) if family == "adam" else (1.0, m)
    return model, {name: 1e-3 * (hidden if name in HIDDEN else other) for name, _ in model.named_parameters()}


def optimizer_of(model: nn.Module, rates: Mapping[str, float], family: str) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    return torch.optim.Adam(groups, eps=1e-12) if family == "adam" else torch.optim.SGD(groups)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 8, generator=g), torch.randint(3, (32,), generator=g)


def bent(how: str, family: str, zero: bool) -> Any:
    """A maker of muP models in which one layer is out of scale: ``2.weight init``, ``4.weight lr``, ..."""
    name, _, what = how.partition(" ")

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, rates = mlp(width, family, zero)
        m = width / 64
        if what == "init":
            model.get_parameter(name).data.mul_(m**0.5)
        elif what == "small init":
            model.get_parameter(name).data.mul_(m**-0.5)
        elif what:
            rates[name] *= {"lr": m, "small lr": 1 / m}[what]
        return model, optimizer_of(model, rates, family)

    return make
