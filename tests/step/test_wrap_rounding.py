"""A rounding that was asked for is honoured or refused by name, also for a model that is cast after wrap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import LooseAdam
from fused_cases import BF16, F32
from torch import Tensor, nn

import optx


def weight(n: int = 64) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), 4.0, dtype=BF16))


def with_gaps() -> nn.Parameter:
    return nn.Parameter(torch.full((8, 8), 4.0, dtype=BF16)[:, ::2])


def moved(opt: optx.Wrapped, p: Tensor, steps: int = 200) -> float:
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        opt.step()
    return float((4 - p.detach().double()).mean())


# What makes a group that no kernel takes, and what the refusal says of it.
UNFUSED: dict[str, tuple[Callable[..., optx.Wrapped], str]] = {
    "a base without rules": (
        lambda **o: optx.wrap(LooseAdam([weight()]), **o),
        "param group 0.*LooseAdam has no fused form.*LooseAdam itself writes its bfloat16 weights",
    ),
    "gaps": (
        lambda **o: optx.wrap(torch.optim.SGD([weight(), with_gaps()], lr=1e-3), **o),
        r"param group 0.*a parameter of shape \(8, 4\) has gaps in memory",
    ),
    "second group": (
        lambda **o: optx.wrap(
            torch.optim.SGD([{"params": [weight()]}, {"params": [with_gaps()]}], lr=1e-3), **o
        ),
        "param group 1.*gaps",
    ),
    "fused=False": (
        lambda **o: optx.wrap(torch.optim.SGD([weight()], lr=1e-3), fused=False, **o),
        "param group 0, which is not fused: fused=False.*SGD itself writes",
    ),
    "wrapped again": (
        lambda **o: optx.wrap(optx.wrap(LooseAdam([weight()])), **o),
        "LooseAdam has no fused form",
    ),
    "mixed dtypes": (
        lambda **o: optx.wrap(LooseAdam([nn.Parameter(torch.ones(2)), weight()]), **o),
        "LooseAdam has no fused form",
    ),
}


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("case", UNFUSED)
def test_what_is_not_fused_refuses_a_rounding_that_was_asked_for(case: str, rounding: Any) -> None:
    make, words = UNFUSED[case]
    with pytest.raises(
        optx.OptxError, match=f"rounding='{rounding}' cannot be honoured for .*{words[:15]}"
    ) as e:
        make(rounding=rounding)
    assert e.match(words)
    assert "foreach" in str(make(rounding="nearest").plan())
    assert "foreach" in str(make().plan())


def test_a_refusal_leaves_the_optimizer_as_it_was() -> None:
    p = weight()
    opt = optx.wrap(torch.optim.SGD([p], lr=1e-3), rounding="kahan")
    with pytest.raises(optx.OptxError, match="rounding='kahan' cannot be honoured for param group 1"):
        opt.add_param_group({"params": [with_gaps()]})
    assert len(opt.param_groups) == 1
    assert moved(opt, p) == pytest.approx(0.2, abs=0.01)
    before = p.detach().clone()
    opt.fused = False
    with pytest.raises(optx.OptxError, match="rounding='kahan' cannot be honoured"):
        opt.step()
    assert torch.equal(p, before)


def test_float32_weights_need_no_rounding_and_are_never_refused() -> None:
    p = nn.Parameter(torch.full((4,), 4.0))
    opt = optx.wrap(LooseAdam([p]), rounding="kahan")
    p.grad = torch.ones(4)
    opt.step()
    p.data = p.data.to(BF16)
    p.grad = torch.ones(4, dtype=BF16)
    with pytest.raises(optx.OptxError, match="rounding='kahan' cannot be honoured"):
        opt.step()


def cast(rounding: Any, when: str, steps: int = 400) -> Tensor:
    """Steps of 1e-4 from 1, where bfloat16's spacing is 0.0039 below it; the model is cast at some time."""
    m = nn.Linear(4096, 1, bias=False)
    nn.init.ones_(m.weight)
    if when == "before wrap":
        m.to(BF16)
    opt = optx.wrap(torch.optim.SGD(m.parameters(), lr=1e-4), fused="cpu", rounding=rounding)
    if when in ("after a copy", "after a load"):
        saved = copy.deepcopy(opt.state_dict())
        m, opt = copy.deepcopy((m, opt))
        if when == "after a load":
            opt.load_state_dict(saved)
    for number in range(steps):
        if number == (when == "between steps"):
            m.to(BF16)
        m.weight.grad = torch.ones_like(m.weight)
        opt.step()
    return m.weight.detach().double()


@pytest.mark.parametrize(
    "when", ["before wrap", "after wrap", "between steps", "after a copy", "after a load"]
)
def test_a_model_cast_at_any_time_draws_new_bits_in_each_step(when: str) -> None:
    """A sum of 400 draws: mean 0.96, std 0.0122; with the same bits in every step half the weights stay."""
    w = cast("stochastic", when)
    assert float(w.mean()) == pytest.approx(0.96, abs=4 * 0.0122 / 64)
    assert float(w.std()) == pytest.approx(0.0122, rel=0.1)
    assert float(w.max()) < 1.0


@pytest.mark.parametrize("when", ["before wrap", "after wrap", "between steps", "after a load"])
def test_a_model_cast_at_any_time_is_compensated(when: str) -> None:
    w = cast("kahan", when, 100)
    assert torch.equal(w, w[:1, :1].expand_as(w))
    assert float(w[0, 0]) == pytest.approx(0.99, abs=2e-3)


def test_a_run_of_a_cast_model_resumes_bit_for_bit() -> None:
    def make() -> tuple[nn.Parameter, optx.Wrapped]:
        p = nn.Parameter(torch.linspace(1, 2, 500))
        opt = optx.wrap(torch.optim.SGD([p], lr=1e-3), fused="cpu")
        p.data = p.data.to(BF16)
        return p, opt

    p, opt = make()
    moved(opt, p, 3)
    saved = copy.deepcopy(opt.state_dict())
    q, other = make()
    other.load_state_dict(saved)
    q.data.copy_(p.data)
    moved(opt, p, 3)
    moved(other, q, 3)
    assert torch.equal(p, q)
    assert opt.param_groups[0]["optx.step"] == 6


def test_moments_in_bfloat16_come_back_as_they_are() -> None:
    """Beside a float32 weight torch would cast them."""
    p = nn.Parameter(torch.ones(9))
    opt = optx.wrap(torch.optim.AdamW([p]), fused="cpu")
    p.grad = torch.ones(9)
    opt.step()
    for k in ("exp_avg", "exp_avg_sq"):
        opt.state[p][k] = opt.state[p][k].to(BF16)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    q = nn.Parameter(p.detach().clone())
    other = optx.wrap(torch.optim.AdamW([q]), fused="cpu")
    other.load_state_dict(saved)
    assert {other.state[q][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {BF16}
    assert other.state[q]["step"].dtype == F32
    q.grad = torch.ones(9)
    opt.step()
    other.step()
    assert torch.equal(p, q)


def test_a_compensation_that_is_not_used_is_not_carried_on() -> None:
    """It would be added to weights that have moved meanwhile, once a kahan run takes it up again."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = optx.wrap(torch.optim.SGD([p], lr=1e-3), rounding="kahan")
    p.grad = torch.ones_like(p)
    opt.step()
    saved = opt.state_dict()
    assert "optx.kahan" in saved["state"][0]
    other = optx.wrap(torch.optim.SGD([p], lr=1e-3), rounding="nearest")
    other.load_state_dict(saved)
    assert "optx.kahan" not in other.state.get(p, {})
    again = optx.wrap(torch.optim.SGD([p], lr=1e-3), rounding="kahan")
    again.load_state_dict(saved)
    assert "optx.kahan" in again.state[p]
