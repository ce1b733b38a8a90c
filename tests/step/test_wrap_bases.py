"""The conformance suite of `optx.wrap`: twelve checks over every base."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES, Base, loss_of, make_net, same, set_train, through_a_file, train
from torch import nn

import optx

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

Transforms = Callable[[], list[optx.Transform]]
NONE: Transforms = list
SOME: Transforms = lambda: [optx.PerpGrad(), optx.AdamR(weight=0.05, normalize=False)]  # noqa: E731

# Of each kind one, and what differs most. What each computes is in test_fused_bases and test_levels, and what
# it saves in test_distributed, for all.
FEW = {
    *("SGD", "AdamW", "AdamW-amsgrad", "NAdam", "Rprop", "Adafactor", "Muon", "LBFGS"),
    *("torch_optimizer.AccSGD", "torch_optimizer.Lamb", "torch_optimizer.AdaBound", "schedulefree.AdamW"),
    *("pytorch_optimizer.Lion", "pytorch_optimizer.StableAdamW"),
}
# A kernel for each base takes seconds to compile: for three of them, as what is wrapped around is the same.
FUSED = {"SGD", "AdamW", "Adafactor"}
every_base = pytest.mark.parametrize(
    "base",
    [pytest.param(base, marks=[pytest.mark.long] * (base.name not in FEW)) for base in BASES],
    ids=str,
)


def path(base: Base) -> Any:
    return "auto" if base.name in FUSED else False


def wrapped(base: Base, net: nn.Module, transforms: Transforms = SOME, **options: Any) -> optx.Wrapped:
    options.setdefault("fused", path(base))
    return optx.wrap(base.make(net.parameters()), *transforms(), **options)


def run(base: Base, steps: int = 4, transforms: Transforms = SOME, **options: Any) -> tuple[nn.Module, Any]:
    net = make_net()
    opt = wrapped(base, net, transforms, **options)
    train(net, opt, range(steps), base.closure)
    return net, opt


@every_base
def test_no_transform_is_the_base_bit_for_bit(base: Base) -> None:
    plain = make_net()
    train(plain, base.make(plain.parameters()), range(5), base.closure)
    net, opt = run(base, 5, NONE, fused=False)
    assert same(plain, net)
    assert all(p.path == "foreach" for p in opt.plan())


@every_base
def test_is_an_optimizer_that_shares_groups_and_state(base: Base) -> None:
    _, opt = run(base)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults
    params = [p for group in opt.param_groups for p in group["params"]]
    assert all(p.grad is not None for p in params)
    opt.zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in params)


@every_base
def test_transforms_act_and_learn(base: Base) -> None:
    plain, _ = run(base, 6, NONE)
    net, _ = run(base, 6)
    assert not same(plain, net)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@every_base
@pytest.mark.parametrize("early", [True, False], ids=["scheduler before", "scheduler after"])
def test_scheduler_reaches_the_base(base: Base, early: bool) -> None:
    net = make_net()
    inner = base.make(net.parameters())
    make = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
    scheduler = make(inner) if early else None
    opt = optx.wrap(inner, *SOME(), fused=path(base))
    scheduler = scheduler or make(opt)
    first = inner.param_groups[0]["lr"]
    train(net, opt, range(1), base.closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(first * 0.5)
    assert opt.param_groups[0]["lr"] == inner.param_groups[0]["lr"]


@every_base
def test_step_hooks_run_once(base: Base) -> None:
    net = make_net()
    inner = base.make(net.parameters())
    calls: list[str] = []
    inner.register_step_pre_hook(lambda *_: calls.append("base pre"))
    inner.register_step_post_hook(lambda *_: calls.append("base post"))
    opt = optx.wrap(inner, *SOME(), fused=path(base))
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    train(net, opt, range(1), base.closure)
    assert calls == ["pre", "base pre", "base post", "post"]


@every_base
def test_state_dict_hooks_run_once(base: Base) -> None:
    _, opt = run(base)
    calls: list[str] = []
    opt.register_state_dict_pre_hook(lambda *_: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("post"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert calls == ["pre", "post", "load pre", "load post"]


@pytest.mark.long(keep=2)
@every_base
@pytest.mark.parametrize("fused", ["auto", False], ids=["auto", "foreach"])
def test_resume_is_bit_identical(base: Base, fused: Any) -> None:
    if fused == "auto" and not path(base):
        pytest.skip("its kernel is compiled and resumed in test_fused_bases")
    if base.closure:
        pytest.skip("torch's LBFGS itself does not resume bit for bit")
    whole, _ = run(base, 6, fused=fused)
    half, opt = run(base, 3, fused=fused)
    checkpoint = through_a_file({"net": half.state_dict(), "opt": opt.state_dict()})
    net = make_net(seed=7)
    again = wrapped(base, net, fused=fused)
    net.load_state_dict(checkpoint["net"])
    again.load_state_dict(checkpoint["opt"])
    train(net, again, range(3, 6))
    assert same(whole, net)


@every_base
def test_learning_rates_stay_linked_after_a_load(base: Base) -> None:
    _, opt = run(base)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=10)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.param_groups[0]["lr"] = 0.123
    assert opt.base.param_groups[0]["lr"] == 0.123
    assert opt.param_groups is opt.base.param_groups
    scheduler.step()
    assert opt.base.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


@every_base
def test_add_param_group_after_training_started(base: Base) -> None:
    if not base.grows:
        pytest.skip("the base's own add_param_group does not work then")
    net, opt = run(base, 2)
    extra = nn.Parameter(torch.full((3, 2), 0.7))
    opt.add_param_group({"params": [extra]})
    start = extra.detach().clone()
    opt.zero_grad()
    for step in range(2, 5):  # some bases start slowly
        (loss_of(net, step) + (extra * torch.arange(6.0).view(3, 2)).sin().sum()).backward()
        opt.step()
    assert not torch.equal(extra, start)
    assert opt.param_groups[1]["adamr_weight"] == 0.05
    assert torch.equal(opt.slot(extra, opt.adamr, "anchor"), start)


@every_base
def test_closure_equals_no_closure(base: Base) -> None:
    with_closure = make_net()
    train(with_closure, wrapped(base, with_closure), range(3), closure=True)
    if base.closure:
        return  # what can be compared is in test_lbfgs_...
    without, _ = run(base, 3)
    assert same(with_closure, without)


@every_base
def test_closure_returns_the_loss(base: Base) -> None:
    net = make_net()
    opt = wrapped(base, net)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    expected = loss_of(net, 0).item()
    set_train(opt)
    assert float(opt.step(closure)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.long(keep=2)
@every_base
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(base: Base, how: str) -> None:
    pair = run(base, 3)
    other: Any = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = copy.deepcopy(pair[0].state_dict())
    train(other[0], other[1], range(3, 5), base.closure)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), pair[0].state_dict().values(), strict=True))
    train(pair[0], pair[1], range(3, 5), base.closure)
    assert same(pair[0], other[0])
    assert other[1].adamr is not pair[1].adamr


@every_base
def test_wrapped_twice_is_wrapped_once_with_both(base: Base) -> None:
    net = make_net()
    inner = wrapped(base, net, lambda: [optx.AdamR(normalize=False)])
    opt = optx.wrap(inner, optx.PerpGrad(), fused=path(base))
    assert opt.base is inner.base
    train(net, opt, range(4), base.closure)
    assert same(net, run(base, 4)[0])


@every_base
def test_late_gradients_and_frozen_parameters(base: Base) -> None:
    net = make_net()
    net.second.bias.requires_grad_(False)
    opt = wrapped(base, net)
    set_train(opt)
    first = net.first.weight.detach().clone()
    frozen = net.second.bias.detach().clone()
    for step in range(4):
        if base.closure and step < 2:
            continue  # LBFGS fixes its vector at the first step
        opt.zero_grad()
        loss_of(net, step).backward()
        if step < 2:
            net.first.weight.grad = None
        if base.closure:
            train(net, opt, [step], closure=True)
        else:
            opt.step()
        if step < 2:
            assert torch.equal(net.first.weight, first)
    assert not torch.equal(net.first.weight, first)
    assert torch.equal(net.second.bias, frozen)


@every_base
def test_checkpoints_load_between_wrapped_and_unwrapped(base: Base) -> None:
    net, opt = run(base, 3)
    plain_net = make_net(seed=3)
    plain = base.make(plain_net.parameters())
    plain.load_state_dict(through_a_file(opt.state_dict()))
    plain_net.load_state_dict(net.state_dict())
    train(plain_net, plain, range(3, 5), base.closure)
    fresh_net = make_net()
    fresh = base.make(fresh_net.parameters())
    train(fresh_net, fresh, range(2), base.closure)
    anchor = opt.slot(net.scale, opt.adamr, "anchor").clone()
    with pytest.warns(UserWarning, match=r"checkpoint has no optx\.adamr\.anchor"):
        opt.load_state_dict(through_a_file(fresh.state_dict()))
    assert torch.equal(opt.slot(net.scale, opt.adamr, "anchor"), anchor)
    train(net, opt, range(5, 7), base.closure)
    assert opt.param_groups[0]["adamr_weight"] == 0.05


@every_base
def test_remove_gives_the_base_back(base: Base) -> None:
    net, opt = run(base, 2)
    inner = opt.remove()
    assert inner is opt.base
    assert not [k for s in inner.state.values() for k in s if str(k).startswith("optx.")]
    assert not [
        k for g in inner.param_groups for k in g if "adamr" in k or "perp" in k or k.startswith("optx.")
    ]
    train(net, inner, range(2, 4), base.closure)
