"""What torch itself puts around an optimizer: schedulers, scaler, clipping, closures, averages, flags."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import batch, loss_of, make_net, same, train
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import optx
from optx import AdamR, PerpGrad

both_paths = pytest.mark.parametrize("fused", ["auto", False], ids=["fused", "foreach"])


pytestmark = pytest.mark.usefixtures("one_thread")


def both() -> list[optx.Transform]:
    return [PerpGrad(), AdamR(weight=0.05)]


def adamw(net: nn.Module, path: Any = "auto", **options: Any) -> optx.Wrapped:
    return optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01, **options), *both(), fused=path)


def close(a: nn.Module, b: nn.Module, off: float = 1e-6) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(float((x - y).detach().abs().max()) <= off for x, y in pairs)


# ---- schedulers -------------------------------------------------------------------------------------------

Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.StepLR(o, 1)], [3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_forgotten() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, lr_scheduler.LRScheduler)
        and kind is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(SCHEDULERS)


def scheduled(make: Scheduler, wrap: Callable[[torch.optim.Optimizer], Any]) -> tuple[nn.Module, list[Any]]:
    """Train with a scheduler; the lr and momentum of every step."""
    net = make_net()
    opt = wrap(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    scheduler, seen = make(opt), []
    for step in range(7):
        train(net, opt, [step])
        group = opt.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return net, seen


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step.*:UserWarning")
def test_schedulers_move_a_wrapped_optimizer_as_the_bare_base(name: str) -> None:
    bare, wanted = scheduled(SCHEDULERS[name], lambda o: o)
    net, seen = scheduled(SCHEDULERS[name], lambda o: optx.wrap(o, fused=False))
    assert seen == wanted
    assert len(set(seen)) > 1
    assert same(net, bare)
    fused, seen = scheduled(SCHEDULERS[name], lambda o: optx.wrap(o, fused=True))
    assert seen == wanted
    assert close(fused, bare)


def test_a_tensor_as_learning_rate_is_read_anew_in_every_step() -> None:
    ends = []
    for wrapped in (False, True):
        for make in (lambda v: v, torch.tensor):
            net = make_net()
            opt: Any = torch.optim.AdamW(net.parameters(), lr=make(0.01), foreach=False)
            opt = optx.wrap(opt) if wrapped else opt
            train(net, opt, range(2))
            opt.param_groups[0]["lr"] = make(0.003)
            train(net, opt, range(2, 4))
            if isinstance(opt.param_groups[0]["lr"], Tensor):
                opt.param_groups[0]["lr"].mul_(0.5)  # in place, as a scheduler does
            else:
                opt.param_groups[0]["lr"] *= 0.5
            train(net, opt, range(4, 6))
            ends.append(net)
    assert all(close(ends[0], other) for other in ends[1:])


# ---- GradScaler -------------------------------------------------------------------------------------------


def scaled(opt: Any, net: nn.Module, steps: range, scaler: Any, spoil: int = -1, clip: bool = False) -> None:
    for step in steps:
        opt.zero_grad()
        loss = loss_of(net, step)
        scaler.scale(loss * math.inf if step == spoil else loss).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()


BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused base": {"fused": True},
    "foreach base": {"foreach": True},
}


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@both_paths
def test_grad_scaler(options: dict[str, Any], clip: bool, fused: Any) -> None:
    """The scale is a power of two: gradients come back bit for bit, and so must everything after them."""
    plain = make_net()
    opt = adamw(plain, fused, **options)
    for step in range(6):
        opt.zero_grad()
        loss_of(plain, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        opt.step()
    net = make_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt = adamw(net, fused, **options)
    scaled(opt, net, range(3), scaler, clip=clip)
    before = copy.deepcopy((net, opt.state_dict(), [p._version for p in net.parameters()]))
    scaled(opt, net, range(100, 101), scaler, spoil=100, clip=clip)
    assert scaler.get_scale() == 128.0
    assert same(net, before[0])
    after = opt.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    entries = [(a, before[1]["state"][n]) for n, a in after["state"].items()]
    assert all(torch.equal(v, old[k]) for new, old in entries for k, v in new.items())
    scaled(opt, net, range(3, 6), scaler, clip=clip)
    assert same(net, plain)


@both_paths
def test_skip_nonfinite_skips_counts_and_returns_the_loss(fused: Any) -> None:
    net = make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters()), *both(), fused=fused, skip_nonfinite=True)
    train(net, opt, range(2))
    before = copy.deepcopy(net)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, 0) * math.inf
        loss.backward()
        return loss

    assert opt.step(closure).item() == math.inf
    assert same(net, before)
    assert opt.skipped_steps == 1
    assert all(float(s["step"]) == 2.0 for s in opt.state.values())
    train(net, opt, range(2, 3))
    assert not same(net, before)


# ---- gradients --------------------------------------------------------------------------------------------


@both_paths
def test_gradients_stay_the_persons_own(fused: Any) -> None:
    net = make_net()
    opt = adamw(net, fused)
    loss_of(net, 0).backward()
    grads = [p.grad for p in net.parameters()]
    bits = [g.clone() for g in grads if g is not None]
    opt.step()
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(g, b) for g, b in zip(grads, bits, strict=True) if g is not None)
    other = copy.deepcopy(net)
    loss_of(net, 1).backward()  # accumulates
    loss_of(other, 1).backward()
    for p, q, g in zip(net.parameters(), other.parameters(), bits, strict=True):
        assert torch.equal(p.grad, g + q.grad)


@both_paths
def test_gradient_accumulation_is_the_joined_batch(fused: Any) -> None:
    nets = [make_net(), make_net()]
    for net, parts in zip(nets, (1, 4), strict=True):
        opt = adamw(net, fused)
        for step in range(4):
            x, y = batch(step)
            for piece in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(net(piece[0]), piece[1]) / parts).backward()
            opt.step()
            opt.zero_grad()
    assert close(*nets, off=1e-5)


@pytest.mark.parametrize("clip", ["norm", "value"])
@both_paths
def test_clipped_gradients_are_what_is_projected(clip: str, fused: Any) -> None:
    net = make_net()
    opt = optx.wrap(torch.optim.SGD(net.parameters(), lr=1.0), PerpGrad(rescale=False), fused=fused)
    loss_of(net, 0).backward()
    if clip == "norm":
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    else:
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
    expected = []
    for p in net.parameters():
        w, g = p.detach().double(), p.grad.double()
        out = g if p.numel() == 1 else g - (w * g).sum() / (w * w).sum().clamp(min=1e-30) * w
        expected.append(w - out)
    opt.step()
    for p, e in zip(net.parameters(), expected, strict=True):
        assert (p - e).abs().max().item() < 1e-6


@both_paths
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool, fused: Any) -> None:
    net = make_net()
    opt = adamw(net, fused)
    loss_of(net, 0).backward()
    grads = [p.grad for p in net.parameters()]
    opt.zero_grad(set_to_none=to_none)
    for p, g in zip(net.parameters(), grads, strict=True):
        assert p.grad is (None if to_none else g)
        assert to_none or not p.grad.any()
    before = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="found no gradient") if to_none else contextlib.nullcontext():
        opt.step()
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True)]
    assert not any(moved) if to_none else any(moved)  # AdamW decays where there is a gradient, be it zero


# ---- averages, compiled models ----------------------------------------------------------------------------


def test_averaged_models() -> None:
    net, plain = make_net(), make_net()
    opt, reference = adamw(net), adamw(plain)
    swa = swa_utils.AveragedModel(net)
    ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    wanted: dict[str, list[Tensor]] = {"swa": [], "ema": []}
    for step in range(4):
        train(net, opt, [step])
        train(plain, reference, [step])
        swa.update_parameters(net)
        ema.update_parameters(net)
        w = plain.first.weight.detach().clone()
        wanted["swa"].append(w)
        wanted["ema"].append(w if not step else 0.5 * wanted["ema"][-1] + 0.5 * w)
    assert same(net, plain)
    assert torch.allclose(swa.module.first.weight, torch.stack(wanted["swa"]).mean(0), atol=1e-6)
    assert torch.allclose(ema.module.first.weight, wanted["ema"][-1], atol=1e-6)


@both_paths
def test_compiled_model(fused: Any) -> None:
    net, plain = make_net(), make_net()
    compiled = torch.compile(net, backend="aot_eager")
    train(plain, adamw(plain, fused), range(4))
    train(compiled, adamw(compiled, fused), range(4))
    assert close(net, plain)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    net = make_net()
    watched = torch.compile(net, backend=counter)
    train(watched, adamw(watched, fused), range(4))
    assert counter.frame_count == 1  # a step changes weights, never what was compiled
