"""The reweight recipe's text (clean, noisy and duplicated sequences), model, and paired times of a step."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._run import SettingsError, clock, device

KINDS = ("clean", "noisy", "duplicated")
NOISE = 0.5
"""Share of a noisy sequence's characters that are drawn at random."""


class Characters:
    """The first 90 % of a text to train on, blocks spread over the rest to measure on.

    Args:
        text: of any length from some hundred sequences on.
        args: ``length``, ``noisy``, ``duplicated``, ``passages``.
    """

    def __init__(self, text: str, args: Any) -> None:
        found = sorted(set(text))
        number = {letter: place for place, letter in enumerate(found)}
        codes = torch.tensor([number[letter] for letter in text])
        cut = len(codes) * 9 // 10
        self.letters, self.args = len(found), args
        self.train, rest = codes[:cut], codes[cut:]
        span = args.length + 1
        if len(rest) < 2 * span:
            raise SettingsError(f"--length {args.length}: the text has only {len(text)} characters.")
        blocks = rest[: len(rest) // span * span].view(-1, span)
        self.measured = blocks[torch.linspace(0, len(blocks) - 1, min(256, len(blocks))).long()]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Characters, the next ones, and each sequence's kind: a function of step and seed alone."""
        g = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        args = self.args
        draw = torch.rand(size, generator=g)
        kinds = (draw < args.noisy + args.duplicated).long() + (draw < args.duplicated).long()
        starts = torch.randint(len(self.train) - args.length, (size,), generator=g)
        few = torch.Generator().manual_seed(seed)
        passages = torch.randint(len(self.train) - args.length, (args.passages,), generator=few)
        again = passages[torch.randint(args.passages, (size,), generator=g)]
        starts = torch.where(kinds == 2, again, starts)
        block = self.train[starts[:, None] + torch.arange(args.length + 1)]
        wrong = torch.randint(self.letters, block.shape, generator=g)
        spoilt = (torch.rand(block.shape, generator=g) < NOISE) & (kinds == 1)[:, None]
        block = torch.where(spoilt, wrong, block).to(device())
        return block[:, :-1], block[:, 1:], kinds

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Clean text that is not trained on."""
        for block in self.measured.to(device()).split(64):
            yield block[:, :-1], block[:, 1:]


class Transformer(nn.Module):
    """Pre-norm, causal, with learnt positions."""

    def __init__(self, letters: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, shape (B, T, C)."""
        x = self.letters(tokens) + self.places.weight
        return self.head(self.blocks(x, self.mask, is_causal=True))


def cost(
    model: nn.Module, reweight: optx.LossReweight | None, batch: tuple[Tensor, Tensor, Tensor], step: int
) -> float:
    """How long a step takes with weights, the same step with the mean being 1: the median over pairs.

    The model is left as it was: the rate is 0. ``step`` is past the warm-up, in which nothing is weighted.
    """
    if reweight is None:
        return 1.0
    reweight.load_state_dict({"step": step, "calls": 0, "skipped": 0})
    x, y, _ = batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def seconds(weighted: bool) -> float:
        began = clock()
        losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        optimizer.zero_grad()
        (reweight(losses) if weighted else losses.mean()).backward()
        optimizer.step()
        return clock() - began

    ratios: list[float] = []
    for pair in range(32):
        first, second = seconds(pair % 2 == 0), seconds(pair % 2 == 1)
        ratios.append(first / second if pair % 2 == 0 else second / first)
    return statistics.median(ratios[2:])
