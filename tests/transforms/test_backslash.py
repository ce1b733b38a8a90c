"""BackSlash against its paper's equation in float64, on both paths, and what it must never do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import optx
from optx._generalised_gaussian import RATIOS, SHAPES, fit_shape, pooled_sums
from optx.transforms.backslash import nearest_shape

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
fits = pytest.mark.parametrize("exact", [True, False], ids=["exact", "one pass"])
EIGHT = [1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0.1, -0.1]
SHRUNK = [0.98279343, -0.98279343, 0.48444157, -0.48444157, 0.08604206, -0.08604206, 0.08604206, -0.08604206]
SHAPES_OF: list[tuple[int, ...]] = [(40, 9), (13,), (), (0,), (3, 4, 5)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, i)) for i, shape in enumerate(SHAPES_OF)]


def give(params: Sequence[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = draw(tuple(p.shape), 100 * step + i + 7)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def one_step(values: Sequence[Sequence[float]], kappa: float, **options: Any) -> tuple[Tensor, float]:
    """Weights that their base leaves alone, after one step, and the shape that was fitted."""
    fused = options.pop("fused", True)
    params = [nn.Parameter(torch.tensor(v)) for v in values]
    opt = optx.wrap(torch.optim.SGD(params, lr=0.1), optx.BackSlash(kappa, **options), fused=fused)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    return torch.cat([p.detach() for p in params]), opt.metrics().get("backslash/shape", math.nan)


# ---- the equation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fused", "exact"), [(True, True), (False, True), (False, False)])
def test_the_specs_step(fused: bool, exact: bool) -> None:
    for parts in ([EIGHT], [EIGHT[:3], EIGHT[3:]], [[v] for v in EIGHT]):  # pooled: parts change nothing
        new, shape = one_step(parts, 0.08, fused=fused, exact=exact)
        torch.testing.assert_close(new, torch.tensor(SHRUNK), rtol=0, atol=1e-7)
        assert shape == 1.35


@both
def test_equal_sizes_have_the_largest_shape(fused: bool) -> None:
    new, shape = one_step([[0.5, -0.5, 0.5]], 0.015, fused=fused)
    assert shape == 2.99
    size = 0.5 - 0.005 * 2.99 * 1.5**1.99
    torch.testing.assert_close(new, torch.tensor([size, -size, size]))


@both
def test_zeros_stay_and_nothing_but_zeros_is_left_alone(fused: bool) -> None:
    new, _ = one_step([[0.0, -0.0, 0.3, -0.6]], 0.1, fused=fused)
    assert (new[:2] == 0).all()
    assert one_step([[0.0, 0.0]], 5.0, fused=fused)[0].tolist() == [0.0, 0.0]


def reference(p: Sequence[Tensor], kappa: float, clip: float, prox: bool, sums: Any = None) -> float:
    """The authors' step, after the base's, in place."""
    absolute, square, count = sums or pooled_sums(p)
    nu = fit_shape(absolute, square, count)
    for w in p:
        step = kappa * nu / count * (w.abs() + clip) ** (nu - 1)
        w -= w.sign() * (torch.minimum(step, w.abs()) if prox else step)
    return nu


@both
@fits
def test_twenty_steps_are_the_authors(fused: bool, exact: bool) -> None:
    """Under AdamW, in float64: to the last bits."""
    prox = not exact
    plain, ours = weights(), weights()
    base = adamw(plain)
    opt = optx.wrap(adamw(ours), optx.BackSlash(5.0, 0.3, until=20, prox=prox, exact=exact), fused=fused)
    for step in range(20):
        give(plain, step)
        give(ours, step)
        before = pooled_sums(plain)
        base.step()
        nu = reference([p.data for p in plain], 5.0, 0.3, prox, None if exact else before)
        opt.step()
        assert opt.metrics()["backslash/shape"] == nu
        assert opt.metrics()["backslash/rate"] == pytest.approx(5.0 * nu / before[2])
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_shape_without_the_grid() -> None:
    """As the grid's, but where two shapes are as near to a hundred-thousandth of their distance."""
    between = (RATIOS[1:] + RATIOS[:-1]) / 2
    near = (RATIOS[:-1] - RATIOS[1:]) * 1e-4
    for ratio in (RATIOS, between - near, between + near, np.array([1.0, 1.2, 250.0, 1e6, 1e30])):
        known = [SHAPES[int(np.abs(RATIOS - one).argmin())] for one in ratio]
        assert nearest_shape(torch.ones(len(ratio)), torch.from_numpy(ratio), 1.0).tolist() == known
    assert nearest_shape(*torch.zeros(2, dtype=torch.float64), 4.0) == 2.99


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.2, 5.0),
    st.floats(-8.0, 3.0),
    st.integers(1, 500),
    st.sampled_from([0.01, 1.0]),
    st.booleans(),
)
def test_any_weights(power: float, scale: float, count: int, clip: float, prox: bool) -> None:
    rng = np.random.default_rng(count)
    w = torch.from_numpy(np.exp(scale) * rng.standard_normal(count) * rng.random(count) ** power)
    kappa = 1e-3 * float(w.abs().mean()) * count
    ours, plain = nn.Parameter(w.clone()), w.clone()
    opt = optx.wrap(torch.optim.SGD([ours], lr=0.1), optx.BackSlash(kappa, clip=clip, prox=True), fused=False)
    ours.grad = torch.zeros_like(ours)
    opt.step()
    reference([plain], kappa, clip, prox=True)
    torch.testing.assert_close(ours.detach(), plain, rtol=1e-12, atol=0)
    assert (ours.detach() * w >= 0).all()


# ---- when it does nothing ----------------------------------------------------------------------------------


def test_kappa_0_is_the_base() -> None:
    plain, ours = weights(), weights()
    base, opt = adamw(plain), optx.wrap(adamw(ours), optx.BackSlash(0.0), fused=False)
    assert opt.backslash.moments(opt.param_groups[0], opt.base) == optx.Moments()  # on every path
    for step in range(3):
        for params, one in ((plain, base), (ours, opt)):
            give(params, step)
            one.step()
    assert all(map(torch.equal, plain, ours))
    opt.backslash.kappa = 1.0
    opt.step()
    base.step()
    assert not torch.equal(plain[0], ours[0])


@both
def test_it_ends(fused: bool) -> None:
    ours = weights()
    opt = optx.wrap(adamw(ours), optx.BackSlash(1.0, until=0.3, total_steps=10), fused=fused)
    rates: list[float] = []
    for step in range(5):
        give(ours, step)
        before = copy.deepcopy(ours)
        state = copy.deepcopy(opt.state_dict())
        opt.step()
        rates.append(opt.metrics()["backslash/rate"])
    assert [rate > 0 for rate in rates] == [True] * 3 + [False] * 2
    alone = adamw(before)
    alone.load_state_dict(state)
    for p, q in zip(before, ours, strict=True):
        p.grad = q.grad
    alone.step()
    for a, b in zip(before, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@both
def test_no_learning_rate_no_shrink(fused: bool) -> None:
    ours = weights()
    opt = optx.wrap(torch.optim.AdamW(ours, lr=0.0), optx.BackSlash(1.0, until=2), fused=fused)
    before = copy.deepcopy(ours)
    give(ours, 0)
    opt.step()
    assert all(map(torch.equal, before, ours))


def test_distributed_checkpoint_on_a_fresh_optimizer_moves_nothing() -> None:
    model = nn.Linear(5, 7)
    opt = optx.wrap(adamw(model.parameters()), optx.BackSlash(0.1, until=2))
    before = copy.deepcopy(model.state_dict())
    state = get_optimizer_state_dict(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert state["state"]["weight"]["optx.backslash.steps"] == 0


@both
def test_groups(fused: bool) -> None:
    """One that is left out is neither shrunk nor counted; a strength of its own is its own."""
    wide, out, weak = (nn.Parameter(torch.tensor(EIGHT)) for _ in range(3))
    groups = [
        {"params": [wide]},
        {"params": [out], "backslash": False},
        {"params": [weak], "backslash_kappa": 0},
    ]
    opt = optx.wrap(torch.optim.SGD(groups, lr=0.1), optx.BackSlash(0.08), fused=fused)
    for p in (wide, out, weak):
        p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(wide.detach(), torch.tensor(SHRUNK), rtol=0, atol=1e-7)
    assert out.tolist() == weak.tolist() == torch.tensor(EIGHT).tolist()


# ---- resume ------------------------------------------------------------------------------------------------


@both
@fits
def test_a_resumed_run_is_the_same(fused: bool, exact: bool) -> None:
    def fresh() -> tuple[list[nn.Parameter], optx.Wrapped]:
        params = weights()
        transform = optx.BackSlash(1.0, until=4, prox=not exact, exact=exact)
        return params, optx.wrap(adamw(params), transform, fused=fused)

    def train(params: Sequence[Tensor], opt: optx.Wrapped, steps: range) -> None:
        for step in steps:
            give(params, step)
            opt.step()

    whole, opt = fresh()
    train(whole, opt, range(6))
    half, first = fresh()
    train(half, first, range(3))  # in the middle of it
    saved, weights_then = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in half]
    again, second = fresh()
    for p, w in zip(again, weights_then, strict=True):
        p.data.copy_(w)
    second.load_state_dict(saved)
    train(again, second, range(3, 6))
    assert all(map(torch.equal, whole, again))
    names = {key for state in saved["state"].values() for key in state if key.startswith("optx.")}
    kept = {"optx.backslash.steps"} | (
        set() if exact else {"optx.backslash.held_abs", "optx.backslash.held_sq"}
    )
    assert names == kept


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kappa": -1.0}, "kappa is -1.0; it must be at least 0"),
        ({"kappa": math.inf}, "finite"),
        ({"kappa": 1.0, "clip": 0.0}, "clip is 0.0"),
        ({"kappa": 1.0, "prox": 1}, "prox is 1; it must be True or False"),
        ({"kappa": 1.0, "exact": "no"}, "exact is 'no'"),
        ({"kappa": 1.0, "until": 0.75}, "less than a step; with total_steps"),
        ({"kappa": 1.0, "until": -1}, "until is -1"),
        ({"kappa": 1.0, "until": 5, "total_steps": 10}, "between 0 and 1"),
        ({"kappa": 1.0, "until": 0.5, "total_steps": 0}, "total_steps is 0"),
        ({"kappa": 1.0, "total_steps": 10}, "until is None"),
    ],
    ids=lambda value: str(value),
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        optx.BackSlash(**options)


def wrapped(transform: optx.BackSlash, make: Callable[..., Any] = torch.optim.SGD) -> optx.Wrapped:
    return optx.wrap(make([nn.Parameter(torch.tensor(EIGHT))], lr=0.1), transform)


def test_a_strength_that_overshoots() -> None:
    with pytest.raises(
        optx.TransformError, match=r"moves a weight by .* overshoots 0. Give a kappa well below"
    ):
        wrapped(optx.BackSlash(2e3))
    wrapped(optx.BackSlash(2e3, prox=True))
    late = nn.Linear(3, 3, device="meta")
    opt = optx.wrap(torch.optim.SGD(late.parameters(), lr=0.1), optx.BackSlash(2e3))
    late.to_empty(device="cpu").reset_parameters()
    opt.param_groups[0]["params"] = list(late.parameters())
    late(torch.ones(1, 3)).sum().backward()
    with pytest.raises(optx.TransformError, match="overshoots"):
        opt.step()
    with pytest.warns(UserWarning, match="most will be at 0 within 6 steps"):
        opt = wrapped(optx.BackSlash(0.4))
    opt.backslash.kappa = 100.0  # by a schedule
    w = opt.param_groups[0]["params"][0]
    w.grad = torch.zeros_like(w)
    with pytest.raises(optx.TransformError, match="overshoots"):
        opt.step()
    assert w.tolist() == torch.tensor(EIGHT).tolist()


# ---- two processes -----------------------------------------------------------------------------------------


def shards_are_fitted_together(_rank: int) -> None:
    """Rows of uneven shards under FSDP2, against one process: the shape is that of all numbers."""
    from torch.distributed.fsdp import fully_shard

    for exact in (True, False):
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        model = copy.deepcopy(alone)
        fully_shard(model)
        with pytest.raises(optx.TargetError, match=r"'0\.weight' is sharded: draw before fully_shard"):
            optx.init.gg_(model)
        shapes: list[list[float]] = []
        for net in (alone, model):
            opt = optx.wrap(adamw(net.parameters()), optx.BackSlash(0.2, exact=exact), metrics=True)
            found: list[float] = []
            for step in range(4):
                opt.zero_grad()
                net(draw((8, 5), step).float()).square().mean().backward()
                opt.step()
                found.append(opt.metrics()["backslash/shape"])
            shapes.append(found)
        assert shapes[0] == shapes[1]
        for a, b in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b.full_tensor(), rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, shards_are_fitted_together)
