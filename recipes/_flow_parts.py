"""The flow recipe's networks, and the two methods that GumbelFlow is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._run import device
from ._sequences_parts import positions


class Denoiser(nn.Module):
    """A transformer of two layers: (x, t), x of shape (batch, length, inputs), to logits of the tokens.

    Args:
        inputs: numbers a position: tokens, and the mask where there is one.
        vocab: tokens.
        length: positions.
        width: of all between.
    """

    def __init__(self, inputs: int, vocab: int, length: int, width: int) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(2 * inputs, width), nn.Linear(16, width)
        self.place = nn.Parameter(positions(torch.empty(length, width)))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.leave = nn.Linear(width, vocab)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(batch, length, vocab)."""
        h = self.enter(seen(x)) + self.place + self.time(waves(t))[:, None]
        return self.leave(self.layers(h))


class Pointwise(nn.Module):
    """A perceptron of each position by itself, for tokens that are independent.

    Args:
        vocab: tokens.
        width: between.
    """

    def __init__(self, vocab: int, width: int = 128) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(2 * vocab, width), nn.Linear(16, width)
        self.leave = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, vocab))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(batch, length, vocab)."""
        return self.leave(self.enter(seen(x)) + self.time(waves(t))[:, None])


class Content(nn.Module):
    """What share of a one-hot sequence is G or C, by convolutions that have to find out."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.GELU(), nn.Conv1d(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch,), between 0 and 1."""
        return torch.sigmoid(self.read(x.mT).mean((1, 2)))


def seen(x: Tensor) -> Tensor:
    """A point and its logits, standardised: near the middle, where flows begin, x itself hardly moves."""
    return torch.cat([x, F.layer_norm(x.clamp_min(1e-6).log(), x.shape[-1:])], -1)


def waves(t: Tensor) -> Tensor:
    """Times as sines and cosines, (batch, 16)."""
    angles = t[:, None] * 2.0 ** torch.arange(8, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


class LinearFlow:
    """Linear flow matching on the simplex: x_t = (1 - t) x_0 + t e_k, x_0 uniform on it."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def loss(self, model: Any, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy with the tokens."""
        t = torch.rand(len(tokens), generator=generator)
        x = self._base(tokens.shape, generator).to(tokens.device)
        t = t.to(tokens.device)
        share = t[:, None, None]
        logits = model((1 - share) * x + share * F.one_hot(tokens, self.vocab), t)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def sample(self, model: Any, shape: Any, steps: int, generator: torch.Generator | None = None) -> Tensor:
        """Along (x_theta - x) / (1 - t)."""
        x = self._base(shape, generator).to(device())
        for n in range(steps):
            p = model(x, torch.full((len(x),), n / steps, device=x.device)).softmax(-1)
            x = x + (p - x) / (steps - n)
        return x.argmax(-1)

    def _base(self, shape: Any, generator: torch.Generator | None) -> Tensor:
        waits = torch.empty(*shape, self.vocab).exponential_(generator=generator)
        return waits / waits.sum(-1, keepdim=True)


class MaskedDiffusion:
    """Masked (absorbing) diffusion: tokens are hidden by the chance 1 - t, and drawn one after the other."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def loss(self, model: Any, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy with those hidden, by 1 / (1 - t)."""
        t = torch.rand(len(tokens), generator=generator).clamp_max(0.99)
        hidden = (torch.rand(tokens.shape, generator=generator) >= t[:, None]).to(tokens.device)
        t = t.to(tokens.device)
        x = F.one_hot(tokens.masked_fill(hidden, self.vocab), self.vocab + 1).float()
        losses = F.cross_entropy(model(x, t).mT, tokens, reduction="none")
        return (losses * hidden / (1 - t[:, None])).mean()

    @torch.no_grad()
    def sample(self, model: Any, shape: Any, steps: int, generator: torch.Generator | None = None) -> Tensor:
        """Each hidden token is drawn in the step from t to t + h by the chance h / (1 - t)."""
        ids = torch.full(shape, self.vocab)
        for n in range(steps):
            x = F.one_hot(ids, self.vocab + 1).float().to(device())
            p = model(x, torch.full((len(x),), n / steps, device=x.device)).softmax(-1).cpu()
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(ids.shape)
            now = (torch.rand(ids.shape, generator=generator) < 1 / (steps - n)) & (ids == self.vocab)
            ids = torch.where(now, drawn, ids)
        return ids


def reader(data: Any, seed: int) -> nn.Module:
    """A classifier of clean sequences: trained to say the share of G and C."""
    torch.manual_seed(seed)
    content, draws = Content().to(device()), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(content.parameters(), lr=0.01)
    for _ in range(200):
        tokens = data.batch(draws, 64)
        x: Tensor = F.one_hot(tokens, 4).float()
        F.binary_cross_entropy(content(x), x[..., 1:3].sum(-1).mean(-1)).backward()
        adam.step()
        adam.zero_grad()
    return content
