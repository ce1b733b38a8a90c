"""DSP-Reg in the loops that people have: accumulation, clipping, scaling, closures and resuming."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import through_a_file
from dsp_loops import batch, give, loss_of, net, one, same, train, wrapped
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])


def close(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


# ---- what a loop does between and around the blocks -------------------------------------------------------


def test_micro_batches_of_a_domain_add_up() -> None:
    models = net(), net()
    whole, parts = wrapped(models[0]), wrapped(models[1])
    for step in range(3):
        train(models[0], whole, [step])
        parts.zero_grad()
        for d in range(3):
            with parts.dsp_reg.domain(d):
                x, y = batch(step, d)
                for half in (slice(4), slice(4, 8)):
                    (nn.functional.cross_entropy(models[1](x[half]), y[half]) / 2).backward()
        parts.step()
    close(*models)
    for a, b in zip(whole.dsp_reg.sensitivity().values(), parts.dsp_reg.sensitivity().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_losses_of_one_forward_pass_are_the_same() -> None:
    models = net(), net()
    blocks, losses = wrapped(models[0]), wrapped(models[1])
    for step in range(3):
        train(models[0], blocks, [step])
        losses.zero_grad()
        data = [batch(step, d) for d in range(3)]
        logits = models[1](torch.cat([x for x, _ in data])).chunk(3)
        parts = zip(logits, data, strict=True)
        losses.dsp_reg.backward(
            {d: nn.functional.cross_entropy(out, y) for d, (out, (_, y)) in enumerate(parts)}
        )
        losses.step()
    close(*models)


def test_clipping_acts_on_the_mean_before_the_penalty() -> None:
    opt, p = one([[3.0, 8.0], [3.0, 0.0]], [1.0, 1.0], weight=0.5)  # mean [3, 4]; variance [0, 16]
    norm = nn.utils.clip_grad_norm_([p], 1.0)
    assert float(norm) == pytest.approx(5.0)
    opt.step()
    torch.testing.assert_close(
        p.detach(), torch.tensor([1.0 - 0.6, 1.0 - 0.8 - 0.5 * 2.0]), rtol=0, atol=1e-5
    )


def test_what_belongs_to_no_domain_is_added_after_the_last() -> None:
    opt, p = one([[1.0], [3.0]], [2.0], weight=0.0)
    (5 * p).sum().backward()
    opt.step()
    assert p.item() == 2.0 - 2.0 - 5.0


def test_a_parameter_without_a_gradient_in_a_domain_has_0_there() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    never = nn.Parameter(torch.ones(2, 2))
    opt = optx.wrap(torch.optim.SGD([a, b, never], lr=0.0), optx.DSPReg(3))
    full = torch.full((2, 2), 6.0)
    for values in ([full, None, None], [None, full, None], [None, None, full]):
        give(opt, [a, b, never], [[v, full, None] for v in values])
        assert torch.equal(a.grad, full / 3)
        spread = opt.slot(a, opt.dsp_reg, "spread")
        torch.testing.assert_close(spread, torch.full((2, 2), 8.0))  # of 6, 0, 0
        assert not opt.slot(b, opt.dsp_reg, "spread").any()
        assert never.grad is None
        opt.step()
        opt.zero_grad()
    assert torch.equal(never, torch.ones(2, 2))


def test_a_gradient_outside_of_every_domain_has_no_variance() -> None:
    a, late = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    opt = optx.wrap(torch.optim.SGD([a, late], lr=0.1), optx.DSPReg(2, ema=0.0))
    give(opt, [a, late], [[torch.zeros(2, 2)] * 2, [torch.ones(2, 2)] * 2])
    opt.step()
    opt.zero_grad()
    give(opt, [a, late], [[torch.zeros(2, 2), None], [torch.ones(2, 2), None]])
    late.grad = torch.ones(2, 2)
    before = late.detach().clone()
    opt.step()
    assert torch.equal(late, before - 0.1)
    assert not opt.slot(late, opt.dsp_reg, "sensitivity").any()


@both
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_gives_a_step_up(fused: bool, set_to_none: bool) -> None:
    models = net(), net()
    ours, plain = (wrapped(m, fused=fused) for m in models)
    for step in range(3):
        for d in range(2):  # a loss that is not finite, say: the loop goes on with the next batch
            with ours.dsp_reg.domain(d):
                loss_of(models[0], step + 50, d).backward()
        ours.zero_grad(set_to_none=set_to_none)
        for model, opt in zip(models, (ours, plain), strict=True):
            for d in range(3):
                with opt.dsp_reg.domain(d):
                    loss_of(model, step, d).backward()
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)
    assert same(*models)


def test_an_error_in_a_block_leaves_the_other_domains() -> None:
    models = net(), net()
    ours, plain = (wrapped(m) for m in models)
    for d in range(3):
        if d:
            with suppress(MemoryError), ours.dsp_reg.domain(d):
                loss_of(models[0], 9, d).backward()
                raise MemoryError
        with ours.dsp_reg.domain(d):
            loss_of(models[0], 0, d).backward()
    ours.step()
    train(models[1], plain, [0])
    assert same(*models)


@both
def test_a_closure_is_no_closure(fused: bool) -> None:
    models = net(), net()
    ours, plain = (wrapped(m, fused=fused) for m in models)

    def evaluate(step: int) -> Tensor:
        ours.zero_grad()
        total = torch.zeros(())
        for d in range(3):
            with ours.dsp_reg.domain(d):
                loss = loss_of(models[0], step, d)
                loss.backward()
                total += loss.detach()
        return total

    for step in range(3):
        train(models[1], plain, [step])
        assert float(ours.step(lambda step=step: evaluate(step))) > 0.0
    assert same(*models)


def test_lbfgs_evaluates_several_times() -> None:
    model = net()
    opt = optx.wrap(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), optx.DSPReg(3, weight=0.1))

    def total() -> Tensor:
        return sum(loss_of(model, 0, d).detach() for d in range(3))  # type: ignore[return-value]

    before = total()

    def closure() -> Tensor:
        opt.zero_grad()
        for d in range(3):
            with opt.dsp_reg.domain(d):
                loss_of(model, 0, d).backward()
        return total() / 3

    for _ in range(4):
        opt.step(closure)
    assert total() < 0.9 * before


# ---- numbers that are not finite, and scales ---------------------------------------------------------------


@both
def test_a_grad_scaler_changes_nothing_whatever_its_scale(fused: bool) -> None:
    """norm="none" shows S itself; the scale changes in every step, and one domain overflows once."""
    models = net(), net()
    ours, plain = (wrapped(m, fused=fused, norm="none") for m in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        ours.zero_grad()
        for d in range(3):
            with ours.dsp_reg.domain(d):
                scaler.scale(loss_of(models[0], step, d)).backward()
                if step == 2 and d == 1:
                    models[0][0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(models[0].parameters(), 1e9)
        before = copy.deepcopy(models[0].state_dict())
        scaler.step(ours)
        scaler.update(1024.0 * 4**step)
        if step == 2:
            assert all(torch.equal(before[name], t) for name, t in models[0].state_dict().items())
        else:
            train(models[1], plain, [step])
    close(*models)
    wanted = plain.dsp_reg.sensitivity()
    for name, s in ours.dsp_reg.sensitivity().items():
        torch.testing.assert_close(s, wanted[name], rtol=1e-4, atol=1e-9)


def test_a_disabled_grad_scaler() -> None:
    models = net(), net()
    ours, plain = (wrapped(m, norm="none") for m in models)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train(models[1], plain, [0])
    for d in range(3):
        with ours.dsp_reg.domain(d):
            scaler.scale(loss_of(models[0], 0, d)).backward()
    scaler.step(ours)
    scaler.update()
    assert same(*models)


@both
def test_a_skipped_step_reaches_nothing(fused: bool) -> None:
    models = net(), net()
    pair = [
        optx.wrap(torch.optim.SGD(m.parameters(), lr=0.05), optx.DSPReg(3), fused=fused, skip_nonfinite=True)
        for m in models
    ]
    for step in range(4):
        pair[0].zero_grad()
        if step == 2:
            for d in range(3):
                with pair[0].dsp_reg.domain(d):
                    (loss_of(models[0], step, d) * (float("nan") if d == 1 else 1.0)).backward()
            pair[0].step()
            assert pair[0].skipped_last
            continue
        for model, opt in zip(models, pair, strict=True):
            train(model, opt, [step])
    assert same(*models)
    assert pair[0].skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_float32_variances(dtype: torch.dtype) -> None:
    """Squares of 1e-6 are 0 in float16, and 7 bits do not hold an average."""
    p = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.0625), optx.DSPReg(2, norm="none"))
    size = 2.0**-18
    give(opt, [p], [[torch.full_like(p, size)], [torch.full_like(p, -3 * size)]])
    assert p.grad.dtype == dtype
    assert torch.equal(p.grad, torch.full_like(p, -size))
    opt.step()
    kept = opt.state[p]["optx.dsp_reg.sensitivity"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, torch.full((64, 64), (2 * size) ** 2))


def test_autocast() -> None:
    models = net(), net()
    ours, plain = (wrapped(m) for m in models)
    for step in range(3):
        ours.zero_grad()
        for d in range(3):
            with torch.autocast("cpu", torch.bfloat16), ours.dsp_reg.domain(d):
                loss_of(models[0], step, d).backward()
        ours.step()
        train(models[1], plain, [step])
    assert all(p.grad.dtype == torch.float32 for p in models[0].parameters())
    assert all(s.dtype == torch.float32 for s in ours.dsp_reg.sensitivity().values())
    close(*models, atol=0.02)


# ---- resuming ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("anchor", [None, "init"])
def test_a_resumed_run_is_bit_identical(fused: bool, anchor: Any, tmp_path: Path) -> None:
    """In the middle of the warm-up and of a schedule of the weight."""
    options = {"warmup": 4, "anchor": anchor, "fused": fused, "norm": "mean"}

    def run(model: nn.Module, opt: optx.Wrapped, steps: range) -> None:
        for step in steps:
            opt.dsp_reg.weight = 0.1 * (step + 1)
            train(model, opt, [step])

    model = net()
    opt = wrapped(model, **options)
    run(model, opt, range(3))
    state, weights = through_a_file(opt.state_dict()), copy.deepcopy(model.state_dict())
    optx.save_optimizer(opt, tmp_path / "opt.safetensors")
    run(model, opt, range(3, 8))
    for load in (
        lambda o: o.load_state_dict(state),
        lambda o: optx.load_optimizer(o, tmp_path / "opt.safetensors"),
    ):
        again = net(7)
        again.load_state_dict(weights)
        resumed = wrapped(again, **options)
        load(resumed)
        run(again, resumed, range(3, 8))
        assert same(model, again)
        for a, b in zip(
            opt.dsp_reg.sensitivity().values(), resumed.dsp_reg.sensitivity().values(), strict=True
        ):
            assert torch.equal(a, b)
    assert "spread" not in str(opt.state_dict()["state"].get(0, {}).keys())


def test_warmup_collects_and_adds_nothing() -> None:
    models = net(), net()
    warm, off = wrapped(models[0], warmup=3, weight=5.0), wrapped(models[1], weight=0.0)
    for model, opt in zip(models, (warm, off), strict=True):
        train(model, opt, range(3))
    assert same(*models)
    assert float(warm.dsp_reg.sensitivity()["0.weight"].max()) > 1.0
    for model, opt in zip(models, (warm, off), strict=True):
        train(model, opt, [3])
    assert not same(*models)


def test_the_anchor_is_where_training_starts() -> None:
    """Weights that are loaded after wrap too."""
    model, loaded = net(), net(5)
    opt = wrapped(model, anchor="init", weight=3.0)
    model.load_state_dict(loaded.state_dict())
    train(model, opt, range(4))
    for p, start in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(opt.slot(p, opt.dsp_reg, "anchor"), start)
    fresh = net(5)
    train(fresh, wrapped(fresh, anchor="init", weight=3.0), range(4))
    assert same(model, fresh)


def test_a_copy_goes_on_alike() -> None:
    model = net()
    opt = wrapped(model)
    train(model, opt, range(2))
    opt.zero_grad()
    with opt.dsp_reg.domain(0):
        loss_of(model, 5, 0).backward()
    twin, copied = copy.deepcopy((model, opt))
    opt.zero_grad()
    train(model, opt, range(2, 4))
    twin.zero_grad()
    train(twin, copied, range(2, 4))
    assert same(model, twin)


def test_a_distributed_checkpoint_of_a_fresh_optimizer_counts_no_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    models = net(), net()
    ours, plain = (wrapped(m) for m in models)
    get_optimizer_state_dict(models[0], ours)
    assert ours.dsp_reg.sensitivity() == {}
    for model, opt in zip(models, (ours, plain), strict=True):
        train(model, opt, range(2))
    assert same(*models)


def test_taking_it_off_and_adding_parameters() -> None:
    model = net()
    opt = wrapped(model)
    train(model, opt, range(2))
    extra = nn.Parameter(torch.ones(3, 3))
    opt.add_param_group({"params": [("extra", extra)]})
    opt.zero_grad()
    for d in range(3):
        with opt.dsp_reg.domain(d):
            (loss_of(model, 2, d) + d * extra.sum()).backward()
    opt.step()
    assert "extra" in opt.dsp_reg.sensitivity()
    assert float(extra.grad[0, 0]) == 1.0
    base = opt.remove()
    assert isinstance(base, torch.optim.SGD)
    assert not any("optx" in str(key) for state in base.state.values() for key in state)


def test_a_compiled_model() -> None:
    models = net(), net()
    ours, plain = (wrapped(m) for m in models)
    compiled = torch.compile(models[0], backend="aot_eager")
    train(compiled, ours, range(2))
    train(models[1], plain, range(2))
    close(*models)


def test_beside_other_transforms_in_the_order_given() -> None:
    """perpGrad before it leaves the penalty along the weight, after it takes that off."""
    along: list[float] = []
    for after in (False, True):
        p = nn.Parameter(torch.tensor([[2.0, 1.0]]))
        parts = [optx.DSPReg(2, weight=1.0), optx.PerpGrad(rescale=False)]
        opt = optx.wrap(torch.optim.SGD([p], lr=1.0), *(parts if after else parts[::-1]), fused=False)
        start = p.detach().clone()
        give(opt, [p], [[torch.tensor([[1.0, -2.0]])], [torch.tensor([[3.0, -6.0]])]])
        opt.step()
        along.append(float(((start - p.detach()) * start).sum()))
    # S^ = [0.4, 1.6], so <w, S^ w> = 0.4 * 4 + 1.6 * 1.
    assert along == pytest.approx([3.2, 0.0], abs=1e-5)


def test_the_base_decides_what_decoupled_is() -> None:
    """Adam would divide a penalty in its gradient by the gradient's size."""
    for base, wanted in ((torch.optim.SGD, False), (torch.optim.AdamW, True), (torch.optim.RMSprop, True)):
        p = nn.Parameter(torch.full((1, 2), 4.0))
        opt = optx.wrap(base([p], lr=0.5), optx.DSPReg(2, weight=0.5))
        twin = nn.Parameter(p.detach().clone())
        said = optx.wrap(base([twin], lr=0.5), optx.DSPReg(2, weight=0.5, decoupled=wanted))
        for o, q in ((opt, p), (said, twin)):
            give(o, [q], [[torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 4.0]])]])
            o.step()
        assert torch.equal(p, twin)
