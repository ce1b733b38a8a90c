"""What the sara recipe trains: digits in two views, the network that reads them, and the blind control."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._handwriting import handwriting
from ._rotated import turned
from ._run import device

PRETRAINING = 300  # steps
ZEROED = [n / 10 for n in range(10)]
Views = dict[str, tuple[Tensor, Tensor]]


class Blind(optx.SaRA):
    """The control: as many entries, whatever their size."""

    def init_slot(self, name: str, p: Tensor, optimizer: Any) -> Tensor:
        """Which entries are selected."""
        return torch.rand(p.shape, device=p.device) < (self.fraction or 0.0)


def load(seed: int, angle: float) -> Views:
    """Upright and turned digits: 1000 to learn from, 200 to choose a rate by, the rest to test on."""
    x, y = handwriting()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(("learn", "choose", "test"), order.split([1000, 200, len(x) - 1200]), strict=True))
    views: Views = {}
    for name, index in parts.items():
        for view, images in (("old", x[index]), ("new", turned(x[index], angle))):
            views[f"{name} {view}"] = images.flatten(1).to(device()), y[index].to(device())
    return views


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of digits that are read right."""
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def network() -> nn.Sequential:
    """A perceptron of two hidden layers."""
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(256, 10)).to(device())


def pretrained(seed: int, views: Views) -> nn.Sequential:
    """A network that reads upright digits."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(PRETRAINING):
        step(model, optimizer, views["learn old"], 32)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], size: int) -> None:
    """One step on a random mini-batch."""
    index = torch.randint(len(data[0]), (size,))
    loss = F.cross_entropy(model(data[0][index]), data[1][index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zeroed(seed: int, angle: float) -> list[float]:
    """How upright digits are read with the smallest shares of all weights set to 0."""
    views = load(seed, angle)
    found: list[float] = []
    for part in ZEROED:
        model = pretrained(seed, views)
        if part:
            sara = optx.SaRA(fraction=part)
            optx.wrap(torch.optim.SGD(model.parameters()), sara)
            for p in model.parameters():
                p.data.masked_fill_(p.data.abs() < (sara.threshold or 0.0), 0.0)
        found.append(accuracy(model, views["test old"]))
    return found
