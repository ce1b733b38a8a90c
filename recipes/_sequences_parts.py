"""The sequences recipe's network and its two tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._handwriting import handwriting
from ._run import device

SIGNALS, HEARD = 8, 8  # how many there are, and how long each is
NOISE = 0.1  # of the tokens behind, where a signal's have deviation 1


class Recurrent(nn.GRU):
    """A GRU that is called as attention is."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        """Its outputs."""
        return super().forward(x)


class Block(nn.Module):
    """A mixer and a perceptron, each behind a norm and beside the residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn: nn.Module = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Tagger(nn.Module):
    """Reads a sequence (batch, L, inputs), and says its class from the last token on.

    Args:
        inputs: numbers a token.
        classes: how many.
        width: of all between.
        positions: attention has to be told them.
    """

    def __init__(self, inputs: int, classes: int, width: int, positions: bool) -> None:
        super().__init__()
        self.positions = positions
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, classes)."""
        h = self.enter(x)
        h = h + positions(h) if self.positions else h
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, -1]))


def positions(h: Tensor) -> Tensor:
    """Sines of the places, (L, width), without which attention knows no order."""
    length, width = h.shape[-2:]
    rates = 10_000 ** (-torch.arange(0, width, 2, device=h.device) / width)
    angles = torch.arange(length, device=h.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]


@dataclass(frozen=True)
class Data:
    """A task: what is drawn to train on, and what is not.

    Attributes:
        inputs: numbers a token.
        classes: how many.
        batch: so many training sequences, and their classes.
        test: batches of the others.
    """

    inputs: int
    classes: int
    batch: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]


def digits(seed: int, _: int) -> Data:
    """scikit-learn's 1,797 digits, dot after dot: 64 tokens of one number; 360 of them test."""
    images, y = handwriting()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x = ((images - images.mean()) / images.std()).flatten(1).unsqueeze(-1)[order].to(device())
    y = y[order].to(device())

    def batch(draws: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(360, len(y), (size,), generator=draws).to(device())
        return x[index], y[index]

    return Data(1, 10, batch, [(x[:360], y[:360])])


def lag(seed: int, length: int) -> Data:
    """One of eight fixed signals of 8 tokens, and noise a tenth as loud up to the end."""
    signals = torch.randn(SIGNALS, HEARD, generator=torch.Generator().manual_seed(1000 + seed))

    def batch(draws: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(SIGNALS, (size,), generator=draws)
        x = NOISE * torch.randn(size, length, 1, generator=draws)
        x[:, :HEARD, 0] = signals[y]
        return x.to(device()), y.to(device())

    unseen = torch.Generator().manual_seed(2000 + seed)
    return Data(1, SIGNALS, batch, [batch(unseen, 128)])


TASKS: dict[str, Callable[[int, int], Data]] = {"digits": digits, "lag": lag}
