"""The reweight recipe's text (clean, noisy and duplicated sequences), model, and paired times of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from . import _characters
from ._run import clock, device

KINDS = ("clean", "noisy", "duplicated")
NOISE = 0.5
"""Share of a noisy sequence's characters that are drawn at random."""


class Characters(_characters.Characters):
    """A text of which some sequences are noisy and some come from a few passages, over and over.

    Args:
        text: of any length from some hundred sequences on.
        args: ``length``, ``noisy``, ``duplicated``, ``passages``.
    """

    def __init__(self, text: str, args: Any) -> None:
        super().__init__(text, args.length)
        self.args = args

    def mixed(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Characters, the next ones, and each sequence's kind: a function of step and seed alone."""
        g, args = self.draws(step, seed), self.args
        draw = torch.rand(size, generator=g)
        kinds = (draw < args.noisy + args.duplicated).long() + (draw < args.duplicated).long()
        starts = self.starts(size, g)
        passages = self.starts(args.passages, torch.Generator().manual_seed(seed))
        again = passages[torch.randint(args.passages, (size,), generator=g)]
        block = self.blocks(torch.where(kinds == 2, again, starts))
        wrong = torch.randint(self.letters, block.shape, generator=g)
        spoilt = (torch.rand(block.shape, generator=g) < NOISE) & (kinds == 1)[:, None]
        block = torch.where(spoilt, wrong, block).to(device())
        return block[:, :-1], block[:, 1:], kinds


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


def cost(model: nn.Module, reweight: optx.LossReweight | None, batch: Sequence[Tensor], step: int) -> float:
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
