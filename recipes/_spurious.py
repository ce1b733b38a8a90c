"""The domains recipe's toy: features that predict the label in every domain, and some that do not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

ARMS = ("erm", "l2", "dsp")
TRAIN, UNSEEN = (1.0, 0.5, 0.1), -0.5  # how far the spurious features follow the label
INVARIANT, SPURIOUS = slice(0, 5), slice(5, 10)


def domain(c: float, generator: torch.Generator, count: int = 500) -> tuple[Tensor, Tensor]:
    """5 features 0.5 y + N(0, 1), 5 features c y + 0.5 N(0, 1), and the label y, which is -1 or 1."""
    y = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1.0
    noise = torch.randn(count, 10, generator=generator)
    return torch.cat([0.5 * y + noise[:, INVARIANT], c * y + 0.5 * noise[:, SPURIOUS]], 1), y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of labels whose sign is right."""
    return float((model(x).detach().sign() == y).float().mean())


def fit(arm: str, seed: int, steps: int = 600, weight: float = 1.0) -> dict[str, Any]:
    """Logistic regression by full-batch gradient descent, lr 0.1; ``weight`` is the penalty's strength."""
    g = torch.Generator().manual_seed(seed)
    data = [domain(c, g) for c in TRAIN]
    unseen, seen = domain(UNSEEN, g, 4000), [domain(c, g, 1000) for c in TRAIN]
    torch.manual_seed(seed)
    model = nn.Linear(10, 1)
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=weight if arm == "l2" else 0.0)
    opt = optx.wrap(sgd, optx.DSPReg(len(TRAIN), weight=weight if arm == "dsp" else 0.0))
    for _ in range(steps):
        opt.zero_grad()
        for d, (x, y) in enumerate(data):
            with opt.dsp_reg.domain(d):
                F.softplus(-y * model(x)).mean().backward()
        opt.step()
    w, s = model.weight.detach()[0], opt.dsp_reg.sensitivity()["weight"][0]
    return {
        "unseen": accuracy(model, *unseen),
        "seen": sum(accuracy(model, *d) for d in seen) / len(seen),
        "invariant": float(w[INVARIANT].abs().mean()),
        "spurious": float(w[SPURIOUS].abs().mean()),
        "ratio": float(s[SPURIOUS].mean() / s[INVARIANT].mean()),
    }
