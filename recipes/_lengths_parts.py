"""The lengths recipe's model, and what it says of texts of several lengths."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._characters import Characters, loss_of
from ._text import evaluated


class Attention(nn.Module):
    """Causal, of heads with rotary positions; ``asked`` it keeps its weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.asked = heads, False
        self.shares = torch.empty(0)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of x, (B, T, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q), rotated(k)
        if self.asked:
            eye = torch.eye(x.shape[1], device=x.device).expand(*q.shape[:2], -1, -1)
            self.shares = F.scaled_dot_product_attention(q, k, eye, is_causal=True)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """Queries or keys (B, heads, T, d) turned by their positions (theta 10,000)."""
    half = x.shape[-1] // 2
    speeds = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and FFN."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.norms = Attention(width, heads), nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x, and what attention and FFN add."""
        x = x + self.attn(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class Transformer(nn.Module):
    """A language model of characters, for texts of any length."""

    def __init__(self, letters: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, (B, T, C)."""
        return self.head(self.norm(self.blocks(self.letters(tokens))))


@torch.no_grad()
def measured(model: nn.Module, text: str, length: int, characters: int) -> dict[str, Any]:
    """Loss of held-out text in sequences of a length, its last eighth's; and attention's entropy there."""
    data = Characters(text, length)
    blocks = data.measured[: max(2, characters // length)]
    kept = [one for one in model.modules() if isinstance(one, Attention)]
    losses, last, spread = [], [], []
    with evaluated(model):
        for block in blocks.split(max(1, 2048 // length)):
            x, y = block[:, :-1], block[:, 1:]
            logits = model(x)
            each = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            losses += each.mean(1).tolist()
            last += each[:, -max(1, length // 8) :].mean(1).tolist()
        for one in kept:
            one.asked = True
        model(blocks[:2, :-1])
        for one in kept:
            rows = one.shares[:, :, -max(1, length // 8) :]
            spread.append(float(torch.special.entr(rows).sum(-1).mean()))
            one.asked, one.shares = False, torch.empty(0)
    return {
        name: sum(found) / len(found)
        for name, found in (("loss", losses), ("last", last), ("entropy", spread))
    }


def step_loss(model: nn.Module, data: Characters, step: int, size: int, seed: int) -> Tensor:
    """The loss of a training batch."""
    return loss_of(model, *data.batch(step, size, seed))
