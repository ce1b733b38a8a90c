"""Small models for the flow's tests: a transformer over simplex points, and one that knows the data's law."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical


class Tiny(nn.Module):
    """One transformer layer; (x, t) or (x, t, condition) to logits."""

    def __init__(self, vocab: int, classes: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(vocab, 16), nn.Linear(1, 16)
        self.told = nn.Embedding(classes, 16) if classes else None
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.leave = nn.Linear(16, vocab)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.enter(x) + self.time(t[:, None])[:, None]
        if self.told is not None and condition is not None:
            h = h + self.told(condition)[:, None]
        return self.leave(self.layer(h))


class Oracle(nn.Module):
    """ln p(k | x_t) + const of independent tokens of a law, by the density that torch.distributions has."""

    def __init__(self, flow: object, law: Tensor) -> None:
        super().__init__()
        self.flow, self.log_law = flow, law.double().log()
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))  # says that it computes in float64

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flow = self.flow
        sharp = flow.tau_max * torch.exp(-flow.decay * t[0])  # type: ignore[attr-defined]
        fixed = flow.noise == "fixed"  # type: ignore[attr-defined]
        temperature = flow.beta * (flow.tau_max if fixed else sharp)  # type: ignore[attr-defined]
        b = flow.beta * (flow.tau_max / sharp - 1 if fixed else 1)  # type: ignore[attr-defined]
        vocab = x.shape[-1]
        law = ExpRelaxedCategorical(
            torch.as_tensor(temperature).double(),
            logits=b * torch.eye(vocab, dtype=torch.float64),
            validate_args=False,
        )
        return law.log_prob(x.log()[..., None, :].expand(*x.shape, vocab)) + self.log_law
