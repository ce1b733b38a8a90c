"""What DSP-Reg is for, small: features that predict the label in every domain, and some that do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import optx

TRAIN, UNSEEN = (1.0, 0.5, 0.1), -0.5  # how far the spurious features follow the label
INVARIANT, SPURIOUS = slice(0, 5), slice(5, 10)


class Run(NamedTuple):
    """What one training ends at."""

    unseen: float
    seen: float
    invariant: float
    spurious: float
    ratio: float


def domain(c: float, generator: torch.Generator, count: int = 500) -> tuple[Tensor, Tensor]:
    """5 features 0.5 y + N(0, 1) and 5 features c y + 0.5 N(0, 1)."""
    y = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1.0
    noise = torch.randn(count, 10, generator=generator)
    return torch.cat([0.5 * y + noise[:, INVARIANT], c * y + 0.5 * noise[:, SPURIOUS]], 1), y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).detach().sign() == y).float().mean())


def fit(seed: int, weight_decay: float = 0.0, **options: Any) -> Run:
    """Full-batch gradient descent: lr 0.1, 500 steps."""
    g = torch.Generator().manual_seed(seed)
    domains = [domain(c, g) for c in TRAIN]
    unseen, seen = domain(UNSEEN, g, 4000), [domain(c, g, 1000) for c in TRAIN]
    torch.manual_seed(seed)
    model = nn.Linear(10, 1)
    base = torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=weight_decay)
    opt = optx.wrap(base, optx.DSPReg(len(TRAIN), **options))
    for _ in range(500):
        opt.zero_grad()
        for d, (x, y) in enumerate(domains):
            with opt.dsp_reg.domain(d):
                nn.functional.softplus(-y * model(x)).mean().backward()
        opt.step()
    w, s = model.weight.detach()[0], opt.dsp_reg.sensitivity()["weight"][0]
    return Run(
        accuracy(model, *unseen),
        sum(accuracy(model, *d) for d in seen) / len(seen),
        float(w[INVARIANT].abs().mean()),
        float(w[SPURIOUS].abs().mean()),
        float(s[SPURIOUS].mean() / s[INVARIANT].mean()),
    )


def test_spurious_features_are_dropped() -> None:
    """ERM and a uniform decay of the same strength keep them; accuracy on domains as seen falls a little."""
    seeds = range(3)
    erm = [fit(seed, weight=0.0) for seed in seeds]
    uniform = [fit(seed, weight=0.0, weight_decay=1.0) for seed in seeds]
    ours = [fit(seed, weight=1.0) for seed in seeds]

    def mean(runs: list[Run], name: str) -> float:
        return sum(getattr(run, name) for run in runs) / len(runs)

    for other in (erm, uniform):
        assert mean(ours, "unseen") > mean(other, "unseen") + 0.25
    assert mean(ours, "seen") > 0.85
    assert mean(ours, "spurious") < 0.1 < 0.9 < mean(erm, "spurious")
    assert mean(ours, "invariant") > 0.7 * mean(erm, "invariant")
    assert mean(ours, "ratio") > 20.0
