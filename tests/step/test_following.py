"""The optimizer follows the model: parameters that come and go after it exists."""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import optx


class Halving(optx.Transform):
    """A method's own work after a step, in a form that shows: a factor is halved."""

    name = "halving"
    slots: ClassVar = {"seen": optx.like_weight()}

    def __init__(self, handle):
        self._handle = handle

    def after_step(self, optimizer):
        for p in self._handle.parameters():
            p.data.mul_(0.5)


class Factors(optx.Part):
    """W = A B in the place of a Linear's weight, which takes no part meanwhile."""

    def __init__(self, module):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(module.out_features, 1, generator=generator))
        self.B = nn.Parameter(torch.randn(1, module.in_features, generator=generator))

    def around(self, call, module, args, kwargs):
        return nn.functional.linear(args[0], self.A @ self.B, module.bias)

    def retired(self, module):
        return [module.weight]

    def settings_of(self, name):
        return self._asked

    _asked: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Factored(optx.Injection):
    """The injection of it."""

    name: ClassVar[str] = "factored"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Linear modules"
    halves: bool = False

    def part(self, module, path):
        return Factors(module)

    def transforms(self, handle):
        return [Halving(handle)] if self.halves else []


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def adam(model, **options):
    decay, plain = [0, 2], [1, 3]
    every = list(model.parameters())
    groups = [
        {"params": [every[i] for i in decay], "lr": 0.1, "weight_decay": 0.5},
        {"params": [every[i] for i in plain], "lr": 0.2, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


def train(model, optimizer, steps=1, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()


def members(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_what_was_attached_joins_the_group_of_what_it_takes_the_place_of():
    model = net()
    base = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5)
    train(model, base)
    weight = model[0].weight
    handle = optx.attach(model, Factored(), targets="0")
    opt = optx.wrap(base, handle)
    assert members(opt, model) == [
        ["2.weight", "0.optx.factored.A", "0.optx.factored.B"],
        ["0.bias", "2.bias"],
    ]
    assert weight not in opt.state
    assert weight.grad is None
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.1]
    train(model, opt)
    assert set(opt.state) == {p for group in opt.param_groups for p in group["params"]}


def test_vectors_go_to_vectors_and_a_module_trained_for_the_first_time_to_the_only_group():
    model = net()
    opt = optx.wrap(adam(model), optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0"))
    first, second = members(opt, model)
    assert first[2:] == ["0.optx.lora.A", "0.optx.lora.B"]
    assert second[2:] == ["0.optx.lora.magnitude"]
    model = net()
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    opt = optx.wrap(torch.optim.SGD(model[2].parameters(), lr=0.1), handle)
    assert members(opt, model) == [["2.weight", "2.bias", "0.optx.lora.A", "0.optx.lora.B"]]


def test_an_optimizer_made_after_the_handle_loses_only_what_takes_no_part():
    model = net()
    handle = optx.attach(model, Factored(), targets="0")
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), handle)
    assert members(opt, model) == [["0.bias", "0.optx.factored.A", "0.optx.factored.B", "2.weight", "2.bias"]]
    train(model, opt)
    handle.remove()
    assert members(opt, model) == [["0.weight", "0.bias", "2.weight", "2.bias"]]
    assert len(opt.state) == 0


def test_removal_gives_the_groups_back_and_takes_along_what_came():
    model = net()
    opt = optx.wrap(adam(model), optx.AdamR(weight=0.0), fused=False)
    train(model, opt)
    before = members(opt, model)
    kept = opt.state[model[2].weight]
    handle = optx.attach(model, Factored(halves=True), targets="0")
    assert optx.wrap(opt, handle, optx.PerpGrad()) is opt
    assert [t.name for t in opt.transforms] == ["halving", "perp_grad", "adamr"]
    train(model, opt)
    joined = handle.parameters()
    handle.remove()
    assert members(opt, model) == before
    assert [t.name for t in opt.transforms] == ["perp_grad", "adamr"]
    assert not hasattr(opt, "halving")
    assert not any(p in opt.state for p in joined)
    assert opt.state[model[2].weight] is kept
    assert not any("halving" in key for d in (*opt.param_groups, *opt.state.values()) for key in d)
    weight = model[0].weight.detach().clone()
    train(model, opt)
    assert not torch.equal(weight, model[0].weight)


def test_what_takes_no_part_asks_for_no_gradient_until_it_does_again():
    model = net()
    model[2].weight.requires_grad_(False)
    with optx.attach(model, Factored(), targets="[02]"):
        assert not model[0].weight.requires_grad
        assert model[0].bias.requires_grad
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]


def test_what_came_works_after_the_step_and_only_after_one_that_was_taken():
    model = net()
    handle = optx.attach(model, Factored(halves=True), targets="0")
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.0), handle, skip_nonfinite=True, fused=False)
    before = handle.parameters()[0].detach().clone()
    train(model, opt)
    assert torch.equal(handle.parameters()[0], before / 2)
    model(torch.full((1, 4), torch.inf)).sum().backward()
    opt.step()
    assert opt.skipped_last
    assert torch.equal(handle.parameters()[0], before / 2)


def test_a_transform_given_by_hand_takes_the_place_of_the_one_that_comes():
    model = net()
    handle = optx.attach(model, Factored(halves=True), targets="0")
    mine = Halving(handle)
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), handle, mine)
    assert opt.transforms == (mine,)


def test_older_transforms_serve_what_joins():
    model = net()
    opt = optx.wrap(adam(model), optx.AdamR(weight=0.1, normalize=False), fused=False)
    handle = optx.attach(model, Factored(), targets="0")
    optx.wrap(opt, handle)
    A = handle.parameters()[0]
    start = A.detach().clone()
    train(model, opt)
    assert torch.equal(opt.state[A]["optx.adamr.anchor"], start)
    assert not torch.equal(A, start)


def resumed(model, opt):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net()
    base = adam(other)
    again = optx.wrap(base, optx.attach(other, Factored(halves=True), targets="0"), optx.PerpGrad())
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    return other, again


def test_resume_and_copies_go_on_bit_for_bit():
    model = net()
    base = adam(model)
    opt = optx.wrap(base, optx.attach(model, Factored(halves=True), targets="0"), optx.PerpGrad())
    train(model, opt, 2)
    other, again = resumed(model, opt)
    third, copied = copy.deepcopy((model, opt))
    for one, its in ((model, opt), (other, again), (third, copied)):
        train(one, its, 2, seed=1)
    for one in (other, third):
        for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(p, q), name
    copied.followed[0].remove()
    assert not opt.followed[0].removed
    assert len(members(copied, third)[0]) == 2 < len(members(opt, model)[0])


def test_names_go_along():
    model = net()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = optx.attach(model, Factored(), targets="0")
    opt = optx.wrap(base, handle)
    names = ["0.bias", "2.weight", "2.bias", "0.optx.factored.A", "0.optx.factored.B"]
    assert opt.param_groups[0]["param_names"] == names
    handle.remove()
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_mistakes_are_told_and_change_nothing():
    model = net()
    base = adam(model)
    train(model, base)
    before, state = members(base, model), dict(base.state)
    handle = optx.attach(model, Factored(), targets="[02]")
    handle.served[0].part._asked = tuple(model.parameters())[:2]
    with pytest.raises(optx.TransformError, match=r"'0\.optx\.factored\.A' takes the place of .* 2 param g"):
        optx.wrap(base, handle)
    handle.served[0].part._asked = ()
    with pytest.raises(optx.TransformError, match="'perp_grad' is given 2 times"):
        optx.wrap(base, handle, optx.PerpGrad(), optx.PerpGrad())
    with pytest.raises(optx.TransformError, match="Pass a handle once"):
        optx.wrap(base, handle, handle)
    assert members(base, model) == before
    assert dict(base.state) == state
    handle.remove()
    with pytest.raises(optx.TransformError, match="was taken off its model"):
        optx.wrap(base, handle)
    model.append(nn.Linear(2, 2))
    with pytest.raises(optx.TransformError, match="2 param groups it belongs to is not known"):
        optx.wrap(base, optx.attach(model, optx.LoRA(rank=1), targets="3"))
    foreign = optx.attach(nn.Sequential(nn.Linear(2, 2)), optx.PSDFactor(), "0")
    with pytest.raises(optx.TransformError, match="no parameter of the model that <PSDFactor"):
        optx.wrap(torch.optim.SGD(net().parameters()), foreign)
    opt = optx.wrap(base)
    released = opt.release(model)
    with pytest.raises(optx.TransformError, match="is released"):
        optx.wrap(opt, optx.attach(model, Factored(), targets="0"))
    released.remove()
    with pytest.raises(optx.TransformError, match=r"must be a torch\.optim\.Optimizer"):
        optx.wrap(model, optx.attach(model, Factored(), targets="2"))


def test_a_group_that_all_leave_stays_for_its_scheduler():
    model = net()
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], "lr": 0.5}]
    base = torch.optim.AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 0.5**step)
    handle = optx.attach(model, Factored(), targets="0")
    opt = optx.wrap(base, handle)
    train(model, opt)
    handle.remove()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.25]
    assert members(opt, model) == [["0.weight"], ["2.weight"]]


def test_removal_after_a_checkpoint_was_loaded_gives_the_groups_back() -> None:
    model = net()
    opt = adam(model)
    before = members(opt, model)
    handle = optx.attach(model, Factored(), targets="0")
    opt = optx.wrap(opt, handle)
    train(model, opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch makes new groups
    handle.remove()
    assert members(opt, model) == before


def test_an_optimizer_that_was_never_told_is_warned_of_once() -> None:
    model = net()
    opt = adam(model)
    handle = optx.attach(model, Factored(), targets="0")
    train(model, opt)
    with pytest.warns(UserWarning, match=r"AdamW has weights .*'0.optx.factored.A' and 1 others") as told:
        train(model, opt, 3)
    assert len(told) == 1
    handle.remove()


def test_optimizers_that_have_what_was_attached_are_left_alone() -> None:
    """Warnings are errors here."""
    before = len(_global_optimizer_post_hooks)
    for tell in (True, False):  # wrap, or an optimizer of its own for what was attached
        model = net()
        opt = adam(model)
        handle = optx.attach(model, Factored(), targets="0")
        copy.deepcopy(handle)
        assert len(_global_optimizer_post_hooks) == before + 1
        if tell:
            opt = own = optx.wrap(opt, handle)
        else:
            own = torch.optim.SGD(handle.parameters(), lr=0.1)
        train(model, opt)
        own.step()
        train(model, opt, 3)
        handle.remove() if tell else None
        del model, opt, handle, own
        gc.collect()
        assert len(_global_optimizer_post_hooks) == before


def test_an_optimizer_that_was_never_told_of_a_lora_is_warned_of_once() -> None:
    """All weights but the new ones were trained, and nothing said so; another optimizer may have them."""
    model = net()
    opt = adam(model)
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    train(model, opt)
    with pytest.warns(UserWarning, match=r"of the model, .* attached to it .'0.optx.lora.A'.*") as told:
        train(model, opt, 3)
    assert len(told) == 1
    other = optx.attach(model, optx.LoRA(rank=2), targets="2")
    rarely = torch.optim.SGD(other.parameters(), lr=0.1)
    train(model, opt, 3)
    del rarely
    second = optx.attach(model, optx.LoRA(rank=2), targets="0", name="second")
    train(model, torch.optim.SGD(second.parameters(), lr=0.1), 3)  # on top of one that is not to move
    handle.remove()


def test_a_loop_that_goes_on_while_its_parameters_are_merged_is_warned_of_once() -> None:
    model = net()
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    opt = torch.optim.AdamW(handle.parameters(), lr=0.1)
    train(model, opt, 2)
    handle.merge()
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    train(model, other)  # which has none of them
    before = [p.detach().clone() for p in handle.parameters()]
    with pytest.warns(UserWarning, match=r"AdamW was stepped while '0.optx.lora.A' and 1 oth") as told:
        train(model, opt, 3)
    assert len(told) == 1
    assert all(map(torch.equal, before, handle.parameters()))
    handle.unmerge()
    train(model, opt)
