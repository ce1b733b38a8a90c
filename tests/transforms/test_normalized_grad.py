"""`optx.NormalizedGrad` against the formula, on both paths, and its floor."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
pers = pytest.mark.parametrize("per", ["tensor", "global"])
F32, F64 = torch.float32, torch.float64
SHAPES: list[tuple[int, ...]] = [(300, 50), (7,), (), (0,), (1,), (70_000,)]


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def weights(dtype: torch.dtype = F32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(shape, i, dtype)) for i, shape in enumerate(shapes)]


def give(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = drawn(tuple(p.shape), 100 * seed + i + 7, p.dtype) * scale


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.25)


def by_hand(params: Sequence[nn.Parameter], per: str, floor: float, eps: float = 0.0) -> list[Tensor]:
    """Where SGD with lr 0.25 is after the step, in float64."""
    grads = [p.grad.double() for p in params]  # type: ignore[union-attr]
    norms = [float(g.norm()) for g in grads]
    if per == "global":
        norms = [math.hypot(*norms)] * len(norms)
    scales = [0.0 if norm < floor or norm == 0.0 else 1.0 / (norm + eps) for norm in norms]
    return [p.detach().double() - 0.25 * s * g for p, s, g in zip(params, scales, grads, strict=True)]


def close(a: Sequence[Tensor], b: Sequence[Tensor], off: float) -> bool:
    return all(torch.allclose(x.double(), y.double(), rtol=off, atol=off) for x, y in zip(a, b, strict=True))


# ---- the formula -------------------------------------------------------------------------------------------


@both
@settings(max_examples=25)
@given(
    per=st.sampled_from(["tensor", "global"]),
    shapes=st.lists(st.sampled_from([*SHAPES, (3, 4, 5), (1025,)]), min_size=1, max_size=4),
    dtype=st.sampled_from([F32, F64]),
    power=st.integers(-16, 16),
    eps=st.sampled_from([0.0, 2.2e-16, 0.5]),
    floor=st.sampled_from([None, 0.0, 1e-9, 3.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_formula(
    fused: bool,
    per: Any,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    power: int,
    eps: float,
    floor: float | None,
    seed: int,
) -> None:
    params = weights(dtype, shapes)
    give(params, seed, 10.0**power)
    least = floor if floor is not None else (1e-6 if dtype == F32 else 1e-12)
    wanted = by_hand(params, per, least, eps)
    before = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    optx.wrap(sgd(params), optx.NormalizedGrad(per, eps, floor), fused=fused).step()
    assert close(params, wanted, 3e-7 if dtype == F32 else 1e-13)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e100, 1e-11])
def test_the_first_step_from_0_is_lr_long_whatever_the_losss_scale(fused: bool, scale: float) -> None:
    """Property 4, with the gradient that it has in closed form."""
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    z, v = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    W = nn.Parameter(torch.zeros(2, 2, dtype=F64))
    loss = torch.nn.functional.softplus(-(v @ X.T @ torch.softmax(X @ W @ z, 0)))
    (scale * loss).backward()
    gradient = torch.tensor([[-0.2689414, -0.5378828], [0.1344707, 0.2689414]], dtype=F64)
    # -l'(u) = 1 / (1 + e) at u = 1: the spec's numbers are the gradient itself
    assert torch.allclose(W.grad / scale, gradient, atol=1e-7)  # type: ignore[operator]
    optx.wrap(torch.optim.SGD([W], lr=0.1), optx.NormalizedGrad(), fused=fused).step()
    assert float(W.detach().norm()) == pytest.approx(0.1, abs=1e-12)
    assert torch.allclose(W.detach(), -0.1 * gradient / gradient.norm(), atol=1e-8)


@both
@pers
@pytest.mark.parametrize("floor", [None, 0.0])
def test_a_gradient_of_zeros_leaves_weights_as_they_are(fused: bool, per: Any, floor: float | None) -> None:
    """Property 8."""
    params = weights()
    start = [p.detach().clone() for p in params]
    opt = optx.wrap(sgd(params), optx.NormalizedGrad(per, floor=floor), fused=fused)
    give(params, 0, 0.0)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))
    assert opt.metrics()["normalized_grad/frozen"] == len(params)


@both
def test_each_factor_has_its_own_norm_and_its_own_floor(fused: bool) -> None:
    K, Q, other = weights(F64, [(4, 3), (4, 3), (5,)])
    start = [p.detach().clone() for p in (K, Q, other)]
    opt = optx.wrap(
        torch.optim.SGD([{"params": [K, Q]}, {"params": [other], "normalized_grad_floor": 1e-20}], lr=0.1),
        optx.NormalizedGrad(),
        fused=fused,
    )
    give([K, Q, other], 0, 1e-13)
    K.grad *= 1e10  # type: ignore[operator]
    opt.step()
    moved = [float((p.detach() - q).norm()) for p, q in zip((K, Q, other), start, strict=True)]
    assert moved == pytest.approx([0.1, 0.0, 0.1], abs=1e-12)
    assert opt.metrics()["normalized_grad/frozen"] == 1.0
    assert "floor=1e-12)" in str(opt.plan()[0])
    assert "floor=1e-20)" in str(opt.plan()[1])


@both
def test_the_global_norm_is_over_groups_and_dtypes_but_not_of_what_is_left_out(fused: bool) -> None:
    params = [*weights(F32, SHAPES[:2]), *weights(F64, SHAPES[1:2]), *weights(F32, [(9,)])]
    groups = [
        {"params": params[:2]},
        {"params": params[2:3]},
        {"params": params[3:], "normalized_grad": False},
    ]
    give(params, 0, 3.0)
    wanted = by_hand(params[:3], "global", 0.0)
    left = params[3].detach().double() - 0.25 * params[3].grad.double()  # type: ignore[union-attr]
    norm = math.hypot(*(float(p.grad.double().norm()) for p in params[:3]))  # type: ignore[union-attr]
    opt = optx.wrap(sgd(groups), optx.NormalizedGrad("global"), fused=fused)
    opt.step()
    assert close(params, [*wanted, left], 3e-7)
    assert opt.metrics()["normalized_grad/norm"] == pytest.approx(norm, rel=1e-7)
    assert opt.plan()[0].waits == ("NormalizedGrad",)


@both
@pers
def test_a_group_of_both_dtypes_has_the_floor_of_the_coarser(fused: bool, per: Any) -> None:
    params = [*weights(F64, [(5,)]), *weights(F32, [(5,)])]
    start = [p.detach().clone() for p in params]
    give(params, 0, 1e-9)
    opt = optx.wrap(sgd(params), optx.NormalizedGrad(per), fused=fused)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))
    opt.normalized_grad.floor = 0.0
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, start, strict=True))


@both
@pers
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_frozen_in_silence(fused: bool, per: Any, value: float) -> None:
    params = weights(shapes=[(5,), (3,)])
    give(params, 0)
    params[0].grad[1] = value  # type: ignore[index]
    optx.wrap(sgd(params), optx.NormalizedGrad(per), fused=fused).step()
    assert bool(params[0][1].isnan())
    skipping = weights(shapes=[(5,), (3,)])
    give(skipping, 0)
    skipping[0].grad[1] = value  # type: ignore[index]
    opt = optx.wrap(sgd(skipping), optx.NormalizedGrad(per), fused=fused, skip_nonfinite=True)
    opt.step()
    assert opt.skipped_last
    assert close(skipping, weights(shapes=[(5,), (3,)]), 0.0)


# ---- with others -------------------------------------------------------------------------------------------


@both
def test_transforms_act_in_the_order_given(fused: bool) -> None:
    """Normalised last, the projected gradient is 1 long; normalised first, what is projected is shorter."""
    lengths = list[float]()
    for chain in (
        [optx.PerpGrad(False), optx.NormalizedGrad()],
        [optx.NormalizedGrad(), optx.PerpGrad(False)],
    ):
        (p,) = weights(F64, [(40,)])
        start = p.detach().clone()
        p.grad = 0.3 * start + drawn((40,), 5, F64)
        opt = optx.wrap(sgd([p]), *chain, fused=fused)
        opt.step()
        lengths.append(float((p.detach() - start).norm()) / 0.25)
    assert lengths[0] == pytest.approx(1.0, abs=1e-9)
    assert 0.5 < lengths[1] < 0.99


@pers
def test_with_a_closure(per: Any) -> None:
    params, plain = weights(F64, [(6, 4), (4,)]), weights(F64, [(6, 4), (4,)])
    opt = optx.wrap(sgd(params), optx.NormalizedGrad(per))

    def loss_of(ps: Sequence[Tensor]) -> Tensor:
        return torch.stack([(p - i).square().sum() for i, p in enumerate(ps)]).sum()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(3):
        assert float(opt.step(closure).detach()) > 0.0
        for p, g in zip(plain, torch.autograd.grad(loss_of(plain), plain), strict=True):
            p.grad = g
        for p, new in zip(plain, by_hand(plain, per, 1e-12), strict=True):
            p.data.copy_(new)
    assert close(params, plain, 1e-12)


@both
@pers
def test_a_grad_scalers_gradients_are_unscaled_first(fused: bool, per: Any) -> None:
    """Scaled by 2^30 they would all be above the floor."""
    params = weights(shapes=[(6, 4), (4,)])
    start = [p.detach().clone() for p in params]
    opt = optx.wrap(sgd(params), optx.NormalizedGrad(per), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    scaler.scale(1e-9 * (params[0] @ params[1]).sum()).backward()
    scaler.step(opt)
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))


@both
@pers
def test_a_resumed_run_is_the_same_to_the_bit(fused: bool, per: Any) -> None:
    def made() -> tuple[list[nn.Parameter], Any]:
        params = weights(shapes=[(30, 5), (7,)])
        base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        return params, optx.wrap(base, optx.NormalizedGrad(per, floor=1e-7), fused=fused)

    params, opt = made()
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save((opt.state_dict(), [p.detach() for p in params]), file)
        give(params, step)
        opt.step()
    others, resumed = made()
    file.seek(0)
    state, kept = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    for p, q in zip(others, kept, strict=True):
        p.data.copy_(q)
    for step in (2, 3):
        give(others, step)
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# ---- mistakes ----------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "per": ({"per": "row"}, "per is 'row'; it must be one of 'tensor', 'global'"),
    "eps": ({"eps": -1e-3}, "eps is -0.001; it must be at least 0"),
    "eps nan": ({"eps": math.nan}, "eps is nan; it must be a number, and finite"),
    "floor": ({"floor": -0.5}, r"floor is -0.5; it must be None \(-1 in a param group\) or at least 0"),
    "floor -1": ({"floor": -1.0}, "floor is -1.0; it must be None or at least 0"),
    "floor word": ({"floor": "auto"}, "floor is 'auto'; it must be a number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    options, words = MISTAKES[case]
    with pytest.raises(optx.TransformError, match=f"NormalizedGrad: {words}"):
        optx.NormalizedGrad(**options)


def test_what_was_read_at_wrap_time_and_what_may_change() -> None:
    opt = optx.wrap(sgd(weights()), optx.NormalizedGrad())
    with pytest.raises(optx.TransformError, match="'per' was read when the optimizer was wrapped"):
        opt.normalized_grad.per = "global"
    with pytest.raises(optx.TransformError, match="floor is -2"):
        opt.normalized_grad.floor = -2
    assert repr(opt.normalized_grad) == "NormalizedGrad(eps=0.0, floor=None)"
    opt.normalized_grad.floor = 0.5
    assert repr(opt.normalized_grad) == "NormalizedGrad(eps=0.0, floor=0.5)"


# ---- several processes -------------------------------------------------------------------------------------


def shards_have_the_norm_of_whole_weights(rank: int) -> None:
    """Under FSDP2, on both paths; 9 rows are not shared evenly."""
    mesh = init_device_mesh("cpu", (2,))
    for per in ("tensor", "global"):
        for fused in (True, False):
            whole, net = (nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3)) for _ in "ab")
            for p, q in zip(whole.parameters(), net.parameters(), strict=True):
                p.data = drawn(tuple(p.shape), p.numel(), F32)
                q.data = p.data.clone()
            fully_shard(net, mesh=mesh)
            for one in (whole, net):
                one(drawn((4, 5), 3, F32)).square().sum().backward()
            wanted = by_hand(list(whole.parameters()), per, 1e-6)
            optx.wrap(sgd(net.parameters()), optx.NormalizedGrad(per), fused=fused).step()  # type: ignore[arg-type]
            assert close([p.full_tensor() for p in net.parameters()], wanted, 1e-6)  # type: ignore[attr-defined]


if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, shards_have_the_norm_of_whole_weights)
