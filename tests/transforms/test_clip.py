"""`optx.Clip` against torch's `clip_grad_norm_`, on both paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
SHAPES: list[tuple[int, ...]] = [(300, 50), (7,), (), (0,), (1,), (70_000,)]
F32, F64 = torch.float32, torch.float64


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def weights(dtype: torch.dtype = F32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, i, dtype)) for i, shape in enumerate(shapes)]


def give(params: Sequence[Tensor], step: int, scale: float) -> None:
    for i, p in enumerate(params):
        p.grad = draw(tuple(p.shape), 100 * step + i + 7, p.dtype) * scale


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def close(a: Sequence[Tensor], b: Sequence[Tensor], off: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, rtol=off, atol=off) for x, y in zip(a, b, strict=True))


# ---- torch's -----------------------------------------------------------------------------------------------


@both
def test_fifty_steps_are_torchs(fused: bool) -> None:
    """Some above the limit and some below it, under a schedule of the limit; norms and gradients too."""
    plain, ours = weights(shapes=SHAPES[:5]), weights(shapes=SHAPES[:5])
    base, opt = adamw(plain), optx.wrap(adamw(ours), optx.Clip(2.0), fused=fused)
    clipped = 0
    for step in range(50):
        scale, limit = 0.005 * (1 + step % 7), 2.0 + 0.01 * step
        give(plain, step, scale)
        give(ours, step, scale)
        norm = float(clip_grad_norm_(plain, limit))
        base.step()
        opt.clip.max_norm = limit
        opt.step()
        assert float(opt.totals["clip.norm"]) == pytest.approx(norm, rel=1e-6)
        clipped += norm > limit
    assert 10 < clipped < 40
    assert close(plain, ours, 5e-6)
    give(plain, 49, scale)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain, ours, strict=True))  # the person's own
    assert opt.plan()[0].passes == 2


@both
def test_several_groups_of_several_dtypes_have_one_norm(fused: bool) -> None:
    plain, ours = ([*weights(F32, SHAPES[:3]), *weights(F64, SHAPES[1:3])] for _ in "ab")
    makes: list[Callable[[Any], Any]] = [lambda o: o, lambda o: optx.wrap(o, optx.Clip(0.3), fused=fused)]
    opts = [
        make(sgd([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.5}]))
        for make, ps in zip(makes, (plain, ours), strict=True)
    ]
    for step in range(4):
        give(plain, step, 0.01)
        give(ours, step, 0.01)
        clip_grad_norm_(plain, 0.3)
        for opt in opts:
            opt.step()
    assert close(plain, ours)
    assert not close(plain, [*weights(F32, SHAPES[:3]), *weights(F64, SHAPES[1:3])], 1e-3)


@both
def test_a_group_that_is_left_out_is_neither_counted_nor_scaled(fused: bool) -> None:
    plain, ours = weights(), weights()
    base = sgd(plain)
    opt = optx.wrap(
        sgd([{"params": ours[:1]}, {"params": ours[1:], "clip": False}]), optx.Clip(0.5), fused=fused
    )
    for params in (plain, ours):
        give(params, 0, 0.1)
    norm = float(clip_grad_norm_(plain[:1], 0.5))
    base.step()
    opt.step()
    assert close(plain, ours)
    assert opt.metrics()["clip/norm"] == pytest.approx(norm, rel=1e-6)
    assert opt.metrics()["clip/scale"] == pytest.approx(0.5 / norm, rel=1e-5)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_without_being_asked_what_is_not_finite_does_what_it_does_in_torch(value: float, fused: bool) -> None:
    plain, ours = weights(shapes=[(5,), (3,)]), weights(shapes=[(5,), (3,)])
    for params in (plain, ours):
        give(params, 0, 1.0)
        params[0].grad[1] = value  # type: ignore[index]
    clip_grad_norm_(plain, 0.5)
    sgd(plain).step()
    optx.wrap(sgd(ours), optx.Clip(0.5), fused=fused).step()
    assert all(torch.equal(p.isnan(), q.isnan()) for p, q in zip(plain, ours, strict=True))
    assert close([p.nan_to_num(7.0) for p in plain], [p.nan_to_num(7.0) for p in ours])


@both
def test_an_error_that_was_asked_for_changes_nothing(fused: bool) -> None:
    ours = weights(shapes=[(5,), (3,)])
    opt = optx.wrap(adamw(ours), optx.Clip(0.5, error_if_nonfinite=True), fused=fused)
    give(ours, 0, 1.0)
    opt.step()
    before = copy.deepcopy((ours, opt.state_dict()))
    ours[1].grad[2] = math.inf  # type: ignore[index]
    with pytest.raises(optx.OptxError, match="the gradients' norm is inf, and error_if_nonfinite=True"):
        opt.step()
    after = opt.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(ours, before[0], strict=True))
    assert all(
        torch.equal(v, before[1]["state"][i][k]) for i, s in after["state"].items() for k, v in s.items()
    )
    give(ours, 1, 1.0)
    opt.step()
    assert not close(ours, before[0], 1e-4)


@both
def test_skip_nonfinite_comes_first_and_costs_no_pass_more(fused: bool) -> None:
    ours = weights(shapes=[(5,), (3,)])
    clip = optx.Clip(0.5, error_if_nonfinite=True)
    opt = optx.wrap(sgd(ours), clip, fused=fused, skip_nonfinite=True)
    give(ours, 0, 1.0)
    ours[0].grad[0] = math.nan  # type: ignore[index]
    start = copy.deepcopy(ours)
    opt.step()
    assert opt.skipped_last
    assert close(ours, start, 0.0)
    assert opt.plan()[0].passes == 2


@both
def test_large_finite_gradients_are_clipped_where_torch_sees_an_infinite_norm(fused: bool) -> None:
    [p] = weights(shapes=[(70_000,)])
    start = p.detach().clone()
    p.grad = torch.zeros(70_000)
    p.grad[3], p.grad[69_000] = 3e30, -4e30
    opt = optx.wrap(sgd([p]), optx.Clip(1.0), fused=fused)
    opt.step()
    moved = p.detach() - start
    assert moved[3].item() == pytest.approx(-0.6, abs=1e-6)
    assert moved[69_000].item() == pytest.approx(0.8, abs=1e-6)
    assert float(opt.totals["clip.norm"]) == pytest.approx(5e30, rel=1e-6)


@both
def test_below_the_limit_nothing_is_changed(fused: bool) -> None:
    plain, ours = weights(), weights()
    base, opt = optx.wrap(sgd(plain), fused=fused), optx.wrap(sgd(ours), optx.Clip(1e6), fused=fused)
    for step in range(2):
        give(plain, step, 1.0)
        give(ours, step, 1.0)
        base.step()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))
    assert opt.metrics()["clip/scale"] == 1.0


# ---- with others -------------------------------------------------------------------------------------------


def projected(p: Tensor) -> Tensor:
    assert p.grad is not None
    w, g = p.detach().double(), p.grad.double()
    out = g if p.numel() < 2 else g - (w * g).sum() / (w * w).sum() * w
    return out.to(p.dtype)


@both
def test_transforms_act_in_the_order_given(fused: bool) -> None:
    """Projecting shortens gradients here, so the order shows; a sum is shared where it can be."""
    shapes = [(40, 3), (9,)]
    ends: list[list[nn.Parameter]] = []
    for first in ("project", "clip"):
        ours, plain = weights(shapes=shapes), weights(shapes=shapes)
        chain = [optx.PerpGrad(rescale=False), optx.Clip(0.5)]
        opt = optx.wrap(sgd(ours), *(chain if first == "project" else chain[::-1]), fused=fused)
        for params in (ours, plain):
            give(params, 0, 0.1)
            for p in params:
                p.grad += 0.1 * p.detach()
        opt.step()
        if first == "clip":
            clip_grad_norm_(plain, 0.5)
        for p in plain:
            p.grad = projected(p)
        if first == "project":
            clip_grad_norm_(plain, 0.5)
        sgd(plain).step()
        assert close(ours, plain), first
        assert opt.plan()[0].passes == (2 if first == "project" else 3)
        ends.append(ours)
    assert not close(*ends, off=1e-3)


@both
def test_adamr_sees_the_clipped_gradient(fused: bool) -> None:
    shapes = [(40, 3), (9,)]
    plain, ours = weights(shapes=shapes), weights(shapes=shapes)
    opts = [
        optx.wrap(
            torch.optim.AdamW(params, lr=0.01, weight_decay=0.0),
            *clip,
            optx.AdamR(0.1, anchor="zero"),
            fused=fused,
        )
        for params, clip in ((plain, []), (ours, [optx.Clip(0.2)]))
    ]
    for step in range(5):
        for params in (plain, ours):
            give(params, step, 0.01 * (step + 1))
        clip_grad_norm_(plain, 0.2)
        for opt in opts:
            opt.step()
    assert close(plain, ours)
    assert float(opts[0].totals["adamr.second"]) == pytest.approx(
        float(opts[1].totals["adamr.second"]), rel=1e-5
    )


@pytest.mark.parametrize("base", [adamw, lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=2)])
def test_with_a_closure(base: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Every evaluation's gradients are clipped, as in a closure that does so itself."""

    def trained(wrapped: bool) -> list[nn.Parameter]:
        params = weights(shapes=[(6, 4), (4,)])
        opt: Any = optx.wrap(base(params), optx.Clip(7.0)) if wrapped else base(params)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = torch.stack([(p - i).square().sum() for i, p in enumerate(params)]).sum()
            loss.backward()
            if not wrapped:
                clip_grad_norm_(params, 7.0)
            return loss

        for _ in range(3):
            assert opt.step(closure) is not None
        return params

    assert close(trained(False), trained(True), off=1e-5)


@both
def test_a_grad_scalers_gradients_are_unscaled_first(fused: bool) -> None:
    ends: list[list[nn.Parameter]] = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=256.0)):
        params = weights(shapes=[(6, 4), (4,)])
        opt = optx.wrap(adamw(params), optx.Clip(0.3), fused=fused)
        for _ in range(3):
            opt.zero_grad()
            loss = (params[0] @ params[1]).square().sum()
            if scaler is None:
                loss.backward()
                opt.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
        assert opt.metrics()["clip/norm"] > 0.3
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


# ---- the limit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, r"max_norm is 0; it must be above 0 \(at 0 every gradient would be 0\)"),
        (-1.0, "max_norm is -1.0; it must be above 0"),
        (math.inf, "must be a number, and finite"),
        (math.nan, "must be a number, and finite"),
        (True, "must be a number, and finite"),
        ("1", "must be a number, and finite"),
    ],
)
def test_limits_that_make_no_sense(value: Any, words: str) -> None:
    with pytest.raises(optx.TransformError, match=f"Clip: .*{words}"):
        optx.Clip(value)
    opt = optx.wrap(sgd(weights()), optx.Clip(2.0))
    with pytest.raises(optx.TransformError, match=words):
        opt.clip.max_norm = value
    assert opt.clip.max_norm == 2.0


def test_the_switch_is_one() -> None:
    with pytest.raises(optx.OptxError, match="error_if_nonfinite is 1; it must be True or False"):
        optx.Clip(1.0, error_if_nonfinite=1)  # type: ignore[arg-type]


def test_groups_have_one_limit_between_them() -> None:
    first, second = weights(shapes=[(3,), (4,)])
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "clip_max_norm": 2.0}]
    words = r"max_norm is 1.0 in param group 0 and 2.0 in group 1.*Set opt.clip.max_norm"
    with pytest.raises(optx.TransformError, match=words):
        optx.wrap(sgd(groups), optx.Clip())
    opt = optx.wrap(sgd([{"params": [first]}]), optx.Clip())
    with pytest.raises(optx.TransformError, match=words):
        opt.add_param_group({"params": [second], "clip_max_norm": 2.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [second]})
    opt.param_groups[1]["clip_max_norm"] = 2.0
    give([first, second], 0, 1.0)
    start = first.detach().clone()
    with pytest.raises(optx.TransformError, match=words):
        opt.step()
    assert torch.equal(first, start)
    opt.param_groups[0]["clip_max_norm"] = torch.tensor(2.0)
    opt.step()
    assert not torch.equal(first, start)


# ---- shards ------------------------------------------------------------------------------------------------


def shards_count_whole(rank: int) -> None:
    """Under FSDP2, and of tensors that two processes don't share evenly: what one process does."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fully_shard(nets[1], mesh=mesh)
    opts: list[Any] = [adamw(nets[0].parameters()), optx.wrap(adamw(nets[1].parameters()), optx.Clip(0.4))]
    assert "fused cpu on local shards" in str(opts[1].plan())
    for step in range(5):
        x = draw((8, 6), step)
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            (step * net(x)).square().mean().backward()
        norm = clip_grad_norm_(nets[0].parameters(), 0.4)
        for opt in opts:
            opt.step()
        assert float(opts[1].totals["clip.norm"]) == pytest.approx(float(norm), rel=1e-6)
    assert close(list(nets[0].parameters()), [p.full_tensor() for p in nets[1].parameters()])  # type: ignore[attr-defined]
    for base in (sgd, lambda ps: torch.optim.RAdam(ps, lr=0.1)):  # one with kernels, one without
        alone = weights(shapes=[(7, 3), (1, 4)])
        parts = [nn.Parameter(distribute_tensor(w.detach(), mesh, [Shard(0)])) for w in alone]
        for params in (alone, parts):
            give(alone, 3, 1.0)
            for p, q in zip(params, alone, strict=True):
                if p is not q:
                    p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        optx.wrap(base(alone), optx.Clip(0.5)).step()
        optx.wrap(base(parts), optx.Clip(0.5)).step()
        assert close(alone, [p.full_tensor() for p in parts])  # type: ignore[attr-defined]


if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, shards_count_whole)


@pytest.mark.filterwarnings("ignore:optx. step.. found no gradient")
def test_a_step_that_is_not_taken_leaves_no_older_norm() -> None:
    w = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.SGD([w], lr=0.1), optx.Clip(), skip_nonfinite=True)
    for grad, norm in ((1.0, 3**0.5), (math.inf, math.nan), (2.0, 12**0.5), (None, math.nan)):
        w.grad = None if grad is None else torch.full((3,), grad)
        opt.step()
        assert float(opt.totals["clip.norm"]) == pytest.approx(norm, nan_ok=True)
