"""What a step computes, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

BF16 = torch.bfloat16


# ---- rounding on the foreach path -------------------------------------------------------------------


@optx.rule(writes="w")
def nudge(w, amount):  # type: ignore[no-untyped-def]
    return w + amount


class Before(optx.Transform):
    """Adds a number to the weights before the base's update."""

    name = "nudge"
    rules = {"weight": nudge}  # noqa: RUF012

    def __init__(self, amount: float) -> None:
        self.options = {"amount": amount}


class After(Before):
    """The same, after it."""

    rules = {"after": nudge}  # noqa: RUF012


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def nudged(base: str, transform: optx.Transform, rounding: Any, start: Tensor, steps: int) -> Tensor:
    """Weights after steps without a gradient to follow, on the foreach path; None rounds stochastically."""
    p = nn.Parameter(start.clone())
    opt = optx.wrap(
        BASES[base]([{"params": [p], "weight_decay": 0.0}]), transform, rounding=rounding, fused=False
    )
    assert "foreach" in str(opt.plan())
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        opt.step()
    return p.detach()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [Before, After])
def test_nearest_drops_what_is_below_half_a_unit_and_stochastic_keeps_it_on_average(
    base: str, kind: type[Before]
) -> None:
    start, ulp, steps = torch.ones(4000, dtype=BF16), 2.0**-7, 8
    still = nudged(base, kind(ulp / 16), "nearest", start, steps)
    assert torch.equal(still, start)
    moved = nudged(base, kind(ulp / 16), None, start, steps).double() - 1
    # A sum of coins that fall right once in 16: variance at most 8 / 16 ulp^2 each.
    assert float(moved.mean()) == pytest.approx(steps * ulp / 16, abs=4 * ulp * (steps / 16 / 4000) ** 0.5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [Before, After])
def test_nearest_is_torchs_own_rounding(base: str, kind: type[Before]) -> None:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(BF16)
    made = nudged(base, kind(0.0123), "nearest", start, 1)
    assert torch.equal(made, start.clone().copy_(start.float() + torch.tensor(0.0123)))
    assert not torch.equal(made, nudged(base, kind(0.0123), None, start, 1))
