"""DSP-Reg with domains that come again before a step: sums, noise taken off, and disparity."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from dsp_loops import batch, loss_of, net, same, train, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx


def vector(domains: int, lr: float = 0.0, **options: Any) -> tuple[optx.Wrapped, nn.Parameter]:
    p = nn.Parameter(torch.ones(4))
    dsp = optx.DSPReg(domains, min_dim=0, accumulate=True, **options)
    return optx.wrap(torch.optim.SGD([p], lr=lr), dsp), p


def give(opt: optx.Wrapped, p: Tensor, blocks: Tensor, order: Any = None) -> None:
    """Blocks of shape (rounds, domains, numbers), backward through a graph as a loop does it."""
    rounds, domains, _ = blocks.shape
    for a, d in order or [(a, d) for a in range(rounds) for d in range(domains)]:
        with opt.dsp_reg.domain(d):
            (p * blocks[a, d]).sum().backward()


def spread(opt: optx.Wrapped, p: Tensor) -> Tensor:
    return opt.slot(p, opt.dsp_reg, "spread")


def drawn(seed: int, rounds: int, domains: int) -> Tensor:
    return torch.randn(rounds, domains, 4, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_rounds_add_up_per_domain(seed: int, rounds: int, domains: int, unbiased: bool) -> None:
    """Whether the rounds or the domains are the outer loop."""
    blocks = drawn(seed, rounds, domains)
    outer = [(a, d) for d in range(domains) for a in range(rounds)]
    for order in (None, outer):
        if domains == 1:
            with pytest.warns(UserWarning, match="one domain"):
                opt, p = vector(domains, unbiased=unbiased)
        else:
            opt, p = vector(domains, unbiased=unbiased)
        give(opt, p, blocks, order)
        sums = blocks.double().sum(0)
        torch.testing.assert_close(p.grad, sums.mean(0).float(), rtol=0, atol=1e-5)
        if domains > 1:
            wanted = sums.var(0, unbiased=unbiased).float()
            torch.testing.assert_close(spread(opt, p), wanted, rtol=1e-4, atol=1e-5)
        opt.step()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 4), st.integers(2, 4), st.booleans())
def test_denoised_and_disparity_are_what_whole_stacks_say(
    seed: int, rounds: int, domains: int, unbiased: bool
) -> None:
    blocks = drawn(seed, rounds, domains)
    within = rounds * blocks.double().var(0)  # of a sum of so many blocks
    sums = blocks.double().sum(0)
    part = 1.0 if unbiased else (domains - 1) / domains
    wanted = {
        "denoised": sums.var(0, unbiased=unbiased) - part * within.mean(0),
        "disparity": within.var(0, unbiased=unbiased),
    }
    for measure, numbers in wanted.items():
        opt, p = vector(domains, unbiased=unbiased, measure=measure)
        give(opt, p, blocks)
        torch.testing.assert_close(spread(opt, p), numbers.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p.grad, sums.mean(0).float(), rtol=0, atol=1e-5)


def test_what_is_left_of_noise() -> None:
    """Domains 2 apart in one weight, alike in the others, and blocks of noise: which is which."""
    sensed: dict[str, Tensor] = {}
    for measure in ("variance", "denoised"):
        opt, p = vector(3, lr=1e-9, measure=measure, norm="none", ema=0.95)
        g = torch.Generator().manual_seed(0)
        for _ in range(80):
            apart = torch.randn(2, 3, 4, generator=g)
            apart[..., 0] += torch.tensor([-1.0, 0.0, 1.0])
            opt.zero_grad()
            give(opt, p, apart)
            opt.step()
        sensed[measure] = opt.dsp_reg.sensitivity()["param_groups[0]['params'][0]"]
    noise = {measure: float(s[1:].mean()) for measure, s in sensed.items()}
    assert noise["variance"] == pytest.approx(4 / 3, rel=0.3)  # 2/3 of the variance of two blocks' sum
    assert noise["denoised"] < 0.3 * noise["variance"]
    assert float(sensed["denoised"][0]) == pytest.approx(8 / 3, rel=0.4)
    assert bool((sensed["denoised"] >= 0).all())


@pytest.mark.parametrize("ema", [0.0, 0.5, 1.0])
def test_s_stays_at_0_or_above(ema: float) -> None:
    """Blocks that differ, domains that do not: each step's spread is below 0."""
    opt, p = vector(2, lr=0.1, measure="denoised", ema=ema, weight=1.0)
    first = torch.tensor([[[1.0] * 4, [5.0] * 4], [[1.0] * 4, [5.0] * 4]])
    give(opt, p, first)
    opt.step()
    assert bool((opt.slot(p, opt.dsp_reg, "sensitivity") == 16.0).all())
    for _ in range(20):
        opt.zero_grad()
        give(opt, p, torch.tensor([[[1.0] * 4] * 2, [[-1.0] * 4] * 2]))
        assert bool((spread(opt, p) < 0).all())
        opt.step()
        assert bool((opt.slot(p, opt.dsp_reg, "sensitivity") >= 0).all())
    assert bool(p.isfinite().all())


def test_one_round_is_what_blocks_that_come_once_are() -> None:
    models = net(), net()
    once, again = wrapped(models[0]), wrapped(models[1], accumulate=True)
    for model, opt in zip(models, (once, again), strict=True):
        train(model, opt, range(3))
    assert same(*models)


def test_an_error_in_a_later_block_leaves_the_sums() -> None:
    models = net(), net()
    ours, plain = (wrapped(m, accumulate=True) for m in models)
    for a in range(2):
        for d in range(3):
            if a and d == 1:
                with suppress(MemoryError), ours.dsp_reg.domain(d):
                    loss_of(models[0], 9, d).backward()
                    raise MemoryError
            for model, opt in zip(models, (ours, plain), strict=True):
                with opt.dsp_reg.domain(d):
                    loss_of(model, a, d).backward()
    ours.step()
    plain.step()
    assert same(*models)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_rounds_gives_the_step_up(set_to_none: bool) -> None:
    models = net(), net()
    ours, plain = wrapped(models[0], accumulate=True), wrapped(models[1])
    with ours.dsp_reg.domain(0):
        loss_of(models[0], 7, 0).backward()
    ours.zero_grad(set_to_none=set_to_none)
    for model, opt in zip(models, (ours, plain), strict=True):
        for d in range(3):
            with opt.dsp_reg.domain(d):
                loss_of(model, 0, d).backward()
        opt.step()
    assert same(*models)


def test_a_copy_begins_its_step_anew_and_rounds_resume() -> None:
    model = net()
    opt = wrapped(model, accumulate=True, measure="denoised")

    def step(model: nn.Module, opt: optx.Wrapped, number: int) -> None:
        opt.zero_grad()
        for half in (slice(4), slice(4, 8)):
            for d in range(3):
                x, y = batch(number, d)
                with opt.dsp_reg.domain(d):
                    (nn.functional.cross_entropy(model(x[half]), y[half]) / 2).backward()
        opt.step()

    step(model, opt, 0)
    with_half = net()
    resumed = wrapped(with_half, accumulate=True, measure="denoised")
    with_half.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.zero_grad()
    with opt.dsp_reg.domain(1):
        loss_of(model, 3, 1).backward()
    twin, copied = copy.deepcopy((model, opt))
    for one, its in ((model, opt), (twin, copied), (with_half, resumed)):
        step(one, its, 1)
    assert same(model, twin)
    assert same(model, with_half)


# ---- mistakes -------------------------------------------------------------------------------------------


def test_mistakes_are_told() -> None:
    opt, p = vector(2, lr=0.5, measure="denoised")
    ones = torch.ones(2, 2, 4)
    give(opt, p, ones, [(0, 0), (0, 1)])
    with pytest.raises(optx.OptxError, match=r"after one block of each domain, and measure='denoised'"):
        opt.step()
    give(opt, p, ones, [(1, 0)])
    with pytest.raises(optx.OptxError, match=r"before domain\(1\) \(1 of 2 are missing\).*equally often"):
        opt.step()
    with pytest.raises(optx.OptxError, match=r"domain\(1\) left no gradient"), opt.dsp_reg.domain(1):
        pass
    nn.utils.clip_grad_norm_([p], 0.1)
    with pytest.raises(optx.OptxError, match=r"changed between domain\(0\) and domain\(1\)"):
        give(opt, p, ones, [(1, 1)])
    assert torch.equal(p, torch.ones(4))
    opt.zero_grad()
    give(opt, p, ones)
    opt.step()
    assert torch.equal(p, torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "denoised"}, "measure='denoised' compares several blocks of a domain; give accumulate"),
        ({"measure": "noise", "accumulate": True}, "measure is 'noise'; it must be one of 'variance', 'deno"),
        ({"accumulate": 2}, "accumulate is 2; it must be one of True, False"),
    ],
)
def test_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.DSPReg(2, **options)
