"""bfloat16 weights: stochastic rounding and Kahan compensation, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import BF16, F32, draw
from reference import spacing
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])


def step_onto(targets: Tensor, fused: Any, seed: int = 0, rounding: str = "stochastic") -> Tensor:
    """One step after which weights of 0 in float32 would be ``targets``; what they are in bfloat16."""
    p = nn.Parameter(torch.zeros_like(targets, dtype=BF16))
    p.grad_dtype = F32
    if fused:
        opt = optx.wrap(torch.optim.SGD([p], lr=1.0), fused=True, rounding=rounding)
        p.grad = -targets
    else:
        # torch's SGD rounds its own step; what optx writes there are its weight rules: a pull of 1 to the
        # anchor ends on it.
        pull = optx.AdamR(1.0, normalize=False, anchor={"p": targets})
        asked = (
            {} if rounding == "stochastic" else {"rounding": rounding}
        )  # the default; asked for, it is refused
        opt = optx.wrap(torch.optim.SGD([("p", p)], lr=1.0), pull, fused=False, **asked)
        p.grad_dtype = BF16
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["optx.seed"] = seed
    opt.step()
    return p.detach()


@both
@pytest.mark.parametrize("fraction", [1 / 512, 1 / 4, 1 / 2, 0.9])
def test_unbiased_and_only_two_neighbours(fused: bool, fraction: float) -> None:
    n = 20_000
    ulp = 2.0**-7
    got = step_onto(torch.full((n,), 1.0 + fraction * ulp), fused).double()
    assert set(got.tolist()) == {1.0, 1.0 + ulp}
    sigma = ulp * (fraction * (1 - fraction) / n) ** 0.5
    assert abs(float(got.mean()) - (1.0 + fraction * ulp)) <= 4 * sigma


@both
def test_exact_values_and_special_ones_are_kept(fused: bool) -> None:
    exact = draw([(3000,)], 0, BF16)[0].float()
    assert torch.equal(step_onto(exact, fused).float(), exact)
    special = torch.tensor([float("inf"), float("-inf"), 0.0, -1.0, 3.3895e38])
    assert torch.equal(step_onto(special, True).float(), special.to(BF16).float())
    assert step_onto(torch.full((64,), float("nan")), fused).isnan().all()
    # A payload of ones only must not carry over into the sign, nor one of low bits be cut to an infinity.
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).repeat(50)
    assert step_onto(patterns.view(F32), True).isnan().all()
    infinite = step_onto(torch.full((64,), float("inf")), True)
    assert (infinite == float("inf")).all()


@both
def test_draws_depend_on_the_seed_and_the_step_only(fused: bool) -> None:
    target = torch.full((5000,), 1.0 + 2.0**-8)
    first = step_onto(target, fused)
    assert torch.equal(first, step_onto(target, fused))
    torch.set_num_threads(1)
    assert torch.equal(first, step_onto(target, fused))
    assert not torch.equal(first, step_onto(target, fused, seed=1))


def test_draws_differ_between_tensors_steps_elements_and_moments() -> None:
    """Weight and momentum fall half-way between neighbours: all coins are fair and unrelated (4 sigma)."""
    n = 10_000
    params = [nn.Parameter(torch.zeros(n, dtype=BF16)) for _ in range(2)]
    opt = optx.wrap(torch.optim.SGD(params, lr=1.0, momentum=0.5), fused=True)
    coins: list[Tensor] = []
    for _ in range(2):
        for p in params:
            p.grad_dtype = F32
            p.grad = torch.full((n,), -(1.0 + 2.0**-8))
            p.data.zero_()
            if p in opt.state:
                opt.state[p]["momentum_buffer"].zero_()
        opt.step()
        coins += [t.detach().abs() > 1.0 for p in params for t in (p, opt.state[p]["momentum_buffer"])]
    assert len(coins) == 8
    for i, a in enumerate(coins):
        assert abs(float(a.double().mean()) - 0.5) <= 4 * 0.5 / n**0.5
        for b in [*coins[i + 1 :], a.roll(1)]:
            assert abs(float((a == b).double().mean()) - 0.5) <= 4 * 0.5 / n**0.5


def test_draws_of_three_rounded_tensors_are_unrelated() -> None:
    """AdamW rounds a weight and two moments: a draw serves two, the third takes another."""
    n = 10_000
    p = nn.Parameter(torch.zeros(n, dtype=BF16))
    p.grad_dtype = F32
    half = 1.0 + 2.0**-8  # half-way between two neighbours
    base = torch.optim.AdamW([p], lr=half, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    opt = optx.wrap(base, fused=True)
    p.grad = torch.full((n,), (2.0 * half) ** 0.5)  # v = g^2 / 2, and a step of lr
    opt.step()
    state = opt.state[p]
    coins = [t.detach().abs() > t.detach().abs().min() for t in (p, state["exp_avg"], state["exp_avg_sq"])]
    chances = [float(c.double().mean()) for c in coins]
    assert all(0.05 < c < 0.95 for c in chances)
    assert chances[0] == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        correlation = float(torch.corrcoef(torch.stack([coins[i].double(), coins[j].double()]))[0, 1])
        assert abs(correlation) <= 4 / n**0.5


def track(rounding: str, fused: Any = True) -> tuple[Tensor, Tensor, Tensor]:
    """1000 updates of 1e-4 relative size: (bfloat16 weight, the same in float32, start)."""
    start = draw([(500,)], 4, BF16)[0].abs() + 0.5
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    rate = {"lr": 1e-4, "weight_decay": 1.0}  # AdamW's decay: w * (1 - 1e-4)
    a = optx.wrap(torch.optim.AdamW([low], **rate), fused=fused, rounding=rounding)
    b = optx.wrap(torch.optim.AdamW([high], **rate), fused=True)
    for _ in range(1000):
        for p in (low, high):
            p.grad = torch.zeros_like(p)
        a.step()
        b.step()
    return low.detach(), high.detach(), start


def test_kahan_tracks_float32_and_nearest_does_not_move() -> None:
    low, high, start = track("kahan")
    ulp = spacing(high.double(), BF16)
    assert float(((low.double() - high.double()).abs() / ulp).max()) <= 1.0
    assert float((high / start.float()).max()) < 0.91  # 0.9999^1000
    still, _, start = track("nearest")
    assert torch.equal(still, start)


def test_stochastic_rounding_tracks_float32_on_average() -> None:
    """Its error is a random walk: of 1000 roundings of up to half an ulp each, 4 sigma of the mean of 500."""
    low, high, _ = track("stochastic")
    off = (low.double() - high.double()) / spacing(high.double(), BF16)
    assert float(off.abs().max()) > 1.0
    assert abs(float(off.mean())) <= 4 * 0.5 * (1000 / 500) ** 0.5


def test_kahan_buffer_is_the_weights_second_half() -> None:
    """Weight plus buffer is within 2^-17 of the weight in float32; a step of 0 moves neither."""
    p = nn.Parameter(draw([(4000,)], 0, BF16)[0])
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), fused=True, rounding="kahan")
    p.grad_dtype = F32
    exact = p.detach().double()
    p.grad = draw([(4000,)], 1, F32)[0]
    opt.step()
    exact = exact - 0.1 * p.grad.double()
    buffer = opt.state[p]["optx.kahan"]
    assert buffer.dtype == BF16
    both_halves = p.detach().double() + buffer.double()
    assert float((both_halves - exact).abs().max()) <= 2.0**-17 * float(exact.abs().max())
    assert bool((buffer.double().abs() <= spacing(p.detach().double(), BF16) / 2).all())
    p.grad = torch.zeros(4000)
    opt.step()
    assert torch.equal(p.detach().double() + buffer.double(), both_halves)
