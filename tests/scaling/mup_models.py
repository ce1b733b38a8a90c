"""Models in widths, whose readout is a class that is given: torch's Linear, or the peer package's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, width: int, readout: Any = nn.Linear) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width, bias=False)
        self.head = readout(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.back(torch.tanh(self.hidden(torch.tanh(self.first(x)))))))


class CNN(nn.Module):
    def __init__(self, width: int, readout: Any = nn.Linear) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = readout(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        x = x + self.o((q @ k.mT / q.shape[-1]).softmax(-1) @ v)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, readout: Any = nn.Linear) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, width), nn.Embedding(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = readout(width, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}
BASE, TARGETS = 16, (16, 48, 64)
LR, DECAY = 3e-3, 0.1


def batch(name: str) -> Tensor:
    """An input of a model, always the same."""
    rng = torch.Generator().manual_seed(1)
    if name == "transformer":
        return torch.randint(0, 11, (4, 6), generator=rng)
    return torch.randn((8, 12) if name == "mlp" else (4, 3, 8, 8), generator=rng)
