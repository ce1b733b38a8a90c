"""A text's characters: what a small language model is trained on from scratch, and measured on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ._run import SettingsError, device
from ._text import evaluated


class Characters:
    """The first 90 % of a text to train on, blocks spread over the rest to measure on.

    Args:
        text: of any length from some hundred sequences on.
        length: characters of a sequence.
    """

    def __init__(self, text: str, length: int) -> None:
        found = sorted(set(text))
        number = {letter: place for place, letter in enumerate(found)}
        codes = torch.tensor([number[letter] for letter in text])
        cut = len(codes) * 9 // 10
        self.letters, self.length = len(found), length
        self.train, rest = codes[:cut], codes[cut:]
        span = length + 1
        if len(rest) < 2 * span:
            raise SettingsError(f"--length {length}: the text has only {len(text)} characters.")
        blocks = rest[: len(rest) // span * span].view(-1, span)
        self.measured = blocks[torch.linspace(0, len(blocks) - 1, min(256, len(blocks))).long()]

    def draws(self, step: int, seed: int) -> Generator:
        """What a batch is drawn with: a function of step and seed alone."""
        return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)

    def starts(self, count: int, draws: Generator) -> Tensor:
        """Where sequences begin."""
        return torch.randint(len(self.train) - self.length, (count,), generator=draws)

    def blocks(self, starts: Tensor) -> Tensor:
        """The sequences that begin there, and the character after each."""
        return self.train[starts[:, None] + torch.arange(self.length + 1)]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Characters and the next ones."""
        block = self.blocks(self.starts(size, self.draws(step, seed))).to(device())
        return block[:, :-1], block[:, 1:]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Text that is not trained on."""
        for block in self.measured.to(device()).split(64):
            yield block[:, :-1], block[:, 1:]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """A model's mean loss per character of that, in nats."""
        with evaluated(model):
            return float(torch.stack([loss_of(model, x, y) for x, y in self.held_out()]).mean())


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the next characters, for models that return logits alone or among others."""
    found = model(x)
    logits = getattr(found, "logits", found)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())  # a bfloat16 loss has three digits
