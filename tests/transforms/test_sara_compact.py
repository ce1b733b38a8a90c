"""SaRA's compact form: equal to the dense one, in so many numbers, read rightly as ``p.grad``."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sara_runs import adamw, assert_same, copies, loss, masks, net, train, wrapped
from torch import Tensor, nn

import optx
from optx.transforms._compact_gradient import CompactGradient
from optx.transforms._gather import Selection

MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam l2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=1e-2, maximize=True),
}


@pytest.mark.parametrize("base", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_dense_run(base: str, dtype: torch.dtype) -> None:
    fused: Any = "auto" if (base, dtype) == ("AdamW", torch.float32) else False
    ran: list[nn.Module] = []
    for compact in (False, True):
        model = net(dtype=dtype)
        sara = optx.SaRA(fraction=0.2, reselect_at=6, compact=compact)
        opt = optx.wrap(MAKERS[base](model.parameters()), sara, fused=fused)
        train(model, opt, range(12))
        ran.append(model)
    for p, q in zip(ran[0].parameters(), ran[1].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-7


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_bfloat16_weights(rounding: Any) -> None:
    model = net(dtype=torch.bfloat16)
    start = copies(model)
    opt = optx.wrap(adamw(model), optx.SaRA(fraction=0.2, compact=True, reselect_at=4), rounding=rounding)
    first = masks(opt, model)
    train(model, opt, range(4))
    at = copies(model)
    train(model, opt, range(4, 8))
    for name, p in model.named_parameters():
        assert torch.equal(p[~first[name]], start[name][~first[name]])
        assert torch.equal(p[~masks(opt, model)[name]], at[name][~masks(opt, model)[name]])
    assert any(not torch.equal(p, at[name]) for name, p in model.named_parameters())


def test_state_is_two_numbers_a_selected_entry_and_gradients_are_one() -> None:
    model = net()
    opt = wrapped(model, compact=True)
    train(model, opt, range(2))
    loss(model).backward()  # a second backward pass adds to the first
    count = opt.sara.density().selected
    tensors = [t for s in opt.state.values() for key, t in s.items() if key.startswith("exp_avg")]
    assert sum(t.numel() for t in tensors) == 2 * count
    assert sum(t.nbytes for t in tensors) == 8 * count
    kept = [p.grad for p in model.parameters()]
    assert all(isinstance(g, CompactGradient) for g in kept)
    assert sum(g.kept.numel() for g in kept) == count  # pyright: ignore
    for p in model.parameters():  # a bit an entry, where a row fills its bytes
        assert opt.state[p]["optx.sara.mask"].nbytes == (p.numel() // 8 if p.ndim == 2 else p.numel())
    reached = [
        t for t in gc.get_objects() if type(t) is Tensor and t.shape == (24, 24) and t.is_floating_point()
    ]
    assert reached == []  # no gradient nor moment of a weight's shape is held anywhere


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=3),
    st.floats(0.0, 2.0),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_gradient_is_the_dense_one_with_zeros_to_whoever_reads_it(
    shape: list[int], threshold: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape).to(dtype))
    mask = w.detach().abs() < threshold
    g = torch.randn(shape).to(dtype)
    dense = g.masked_fill(~mask, 0)
    w.grad = CompactGradient(g[mask], Selection(mask, w.shape))
    other = nn.Parameter(w.detach().clone())
    other.grad = dense.clone()
    assert torch.equal(w.grad * 2.0, dense * 2.0)
    assert torch.equal(w.grad + 1.0, dense + 1.0)
    assert torch.equal(w.grad.abs().sum(), dense.abs().sum())
    assert torch.equal(w.grad.clone() == 0, dense == 0)
    for norm in (2.0, 1.0, float("inf"), 0.5):
        got = nn.utils.get_total_norm([w.grad], norm) if w.numel() else torch.tensor(0.0)
        want = nn.utils.get_total_norm([other.grad], norm) if w.numel() else torch.tensor(0.0)
        assert torch.allclose(got, want.to(got.dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    if w.numel():
        nn.utils.clip_grad_value_([w, other], 0.3)
        nn.utils.clip_grad_norm_([w], 0.1)
        nn.utils.clip_grad_norm_([other], 0.1)
        assert isinstance(w.grad, CompactGradient)
        assert torch.allclose(w.grad.dense(), other.grad, rtol=2e-2, atol=1e-6)
        nn.utils.clip_grad_norm_([w, other], 1e-3, foreach=True)
        assert torch.allclose(w.grad.dense(), other.grad, rtol=2e-2, atol=1e-6)
    with pytest.raises(optx.OptxError, match="can't write into a gradient of compact=True"):
        w.grad.cumsum_(0) if w.ndim else w.grad.bernoulli_()


def accumulated(model: nn.Module, opt: Any, compact: bool) -> None:
    """Two micro-batches a step, clipped by the norm of what is selected."""
    for step in range(5):
        opt.zero_grad(set_to_none=step % 2 == 0)
        for micro in (0, 1):
            loss(model, 2 * step + micro).backward()
        if not compact:
            for name, p in model.named_parameters():
                p.grad.masked_fill_(~masks(opt, model)[name], 0)  # type: ignore[union-attr]
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)) > 0.05
        opt.step()


def test_accumulation_clipping_and_zeroed_gradients() -> None:
    models = net(), net()
    for model, compact in zip(models, (False, True), strict=True):
        accumulated(model, wrapped(model, compact=compact), compact)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).abs().max() <= 1e-6


def test_gradients_set_by_hand_and_grad_scaler() -> None:
    a, b = net(), net()
    plain, scaled = wrapped(a, compact=True), wrapped(b, compact=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        plain.zero_grad()
        loss(a, step).backward()
        for p in a.parameters():  # as federated averaging does
            p.grad = p.grad * 1.0  # type: ignore[operator]
            assert type(p.grad) is Tensor
        plain.step()
        scaled.zero_grad()
        scaler.scale(loss(b, step)).backward()
        scaler.unscale_(scaled)
        nn.utils.clip_grad_norm_(b.parameters(), 1e6)
        scaler.step(scaled)
        scaler.update()
    assert_same(a, b)
    before = copies(b)
    scaled.zero_grad()
    scaler.scale(loss(b) * float("inf")).backward()
    scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, before[n]) for n, p in b.named_parameters())
    assert scaled.sara.steps == 6


def test_a_failing_step_leaves_everything_as_it_was() -> None:
    model = net()
    opt = wrapped(model, compact=True)
    train(model, opt, range(2))
    before, groups = copies(model), [list(g["params"]) for g in opt.param_groups]
    loss(model).backward()
    lr, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], "x"
    with pytest.raises(optx.OptxError, match="lr"):
        opt.step()
    opt.param_groups[0]["lr"] = lr
    assert all(
        a is b
        for g, known in zip(opt.param_groups, groups, strict=True)
        for a, b in zip(g["params"], known, strict=True)
    )
    assert set(opt.state) == set(model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(isinstance(p.grad, CompactGradient) for p in model.parameters())
    opt.step()
    assert opt.sara.steps == 3


def test_removal_gives_weights_gradients_and_state_their_shapes() -> None:
    model, dense = net(), net()
    opt, same = wrapped(model, compact=True), wrapped(dense)
    train(model, opt, range(3))
    train(dense, same, range(3))
    base, other = opt.remove(), same.remove()
    loss(model).backward()
    loss(dense).backward()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert type(p.grad) is Tensor
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(base.state[p][key], other.state[q][key], atol=1e-9)
    # And a base that has been trained already is taken on with its moments.
    a, b = net(), net()
    ran: list[Any] = []
    for m, compact in ((a, False), (b, True)):
        plain = adamw(m)
        train(m, plain, range(2))
        opt = optx.wrap(plain, optx.SaRA(fraction=0.2, compact=compact))
        train(m, opt, range(2, 6))
        ran.append(opt)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-7


def test_a_dropped_optimizer_gathers_no_more() -> None:
    model = net()
    opt = wrapped(model, compact=True)
    train(model, opt, range(1))
    del opt
    gc.collect()
    model.zero_grad()
    loss(model).backward()
    assert all(type(p.grad) is Tensor for p in model.parameters())


def test_plan_tells_of_the_selected_entries() -> None:
    model = net()
    opt = wrapped(model, compact=True)
    loss(model).backward()
    assert f"{opt.sara.density().selected} numbers" in str(opt.plan())
    assert "fused cpu" in str(opt.plan())
