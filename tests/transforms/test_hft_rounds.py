"""HFT across rounds: groups that come later, flags that a person sets, and who holds whom."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import through_a_file
from hft_models import Residual, fresh, weights
from hft_runs import adamw, moved, push, train
from torch import Tensor, nn

import optx
from optx import OptxError, TransformError
from optx.transforms.hft import HFT

# ---- groups that come later ------------------------------------------------------------------------------


def split(model: Residual) -> tuple[list[Tensor], list[Tensor]]:
    last = list(model.blocks[3].parameters())
    return [p for p in model.parameters() if all(p is not q for q in last)], last


def add(opt: Any, params: list[Tensor]) -> None:
    opt.add_param_group({"params": params})


def append(opt: Any, params: list[Tensor]) -> None:
    opt.param_groups.append({**opt.param_groups[0], "params": params})


def extend(opt: Any, params: list[Tensor]) -> None:
    opt.param_groups[0]["params"].extend(params)


@pytest.mark.parametrize("how", [add, append, extend])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_group_that_comes_later_is_frozen_too(how: Callable[..., None], rounds: int) -> None:
    model = fresh()
    first, last = split(model)
    opt = optx.wrap(torch.optim.SGD(first, lr=0.1), HFT(model, seed=1), fused=False)
    for _ in range(rounds):
        opt.hft.next_round()
    chosen = opt.hft.selected()
    assert any(name.startswith("blocks.3") for name in chosen.frozen)
    push(model, opt)
    how(opt, last)
    assert moved(model, opt) == set(chosen.trainable)
    assert opt.hft.selected().trainable == chosen.trainable
    assert moved(model, opt) == set(chosen.trainable)
    chosen = opt.hft.next_round()
    assert moved(model, opt) == set(chosen.trainable)


def test_a_group_that_comes_opted_out_changes_nothing_else() -> None:
    model = fresh()
    first, last = split(model)
    opt = optx.wrap(torch.optim.SGD(first, lr=0.1), HFT(model, seed=1))
    chosen = opt.hft.selected()
    opt.add_param_group({"params": last, "hft": False})
    mine = {name for name in weights(model) if name.startswith("blocks.3")}
    assert moved(model, opt) == set(chosen.trainable) | mine
    opt.param_groups[1]["hft"] = True
    assert moved(model, opt) == set(chosen.trainable)
    opt.param_groups[1]["hft"] = False
    assert moved(model, opt) == set(chosen.trainable) | mine
    opt.hft.next_round()
    assert mine <= set(opt.hft.selected().trainable)


@pytest.mark.parametrize("how", [add, append, extend])
def test_a_block_that_the_model_gets_later_is_halved_too(how: Callable[..., None]) -> None:
    model = fresh()
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), HFT(model, ratio=0.25, seed=1))
    chosen = set(opt.hft.selected().trainable)
    new = Residual(4).blocks
    for block in new:
        model.blocks.append(block)
    push(model, opt)
    how(opt, list(new.parameters()))
    now = opt.hft.selected()
    added = {name for name in weights(model) if name.startswith(tuple(f"blocks.{i}" for i in range(4, 8)))}
    assert set(now.trainable) - added == chosen
    assert len(now.trainable) == len(chosen) + len(added) / 4
    assert moved(model, opt) == set(now.trainable)


def test_parameters_that_are_replaced_stay_frozen() -> None:
    """Accelerate and FSDP2 put other objects into the model and the groups."""
    model = fresh()
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), HFT(model))
    chosen = opt.hft.selected()
    new: list[nn.Parameter] = []
    push(model, opt)
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        new.append(nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        setattr(model.get_submodule(owner), leaf, new[-1])
    opt.param_groups[0]["params"] = new
    assert moved(model, opt) == set(chosen.trainable)


# ---- what a person does ----------------------------------------------------------------------------------


def first_of(names: Any, start: str = "blocks.") -> str:
    return next(name for name in names if name.startswith(start) and name.endswith("weight"))


def test_frozen_by_hand_in_a_round_stays_frozen() -> None:
    model = fresh()
    opt = optx.wrap(adamw(model), HFT(model, rounds_every=2))
    train(model, opt, 1)
    name = first_of(opt.hft.selected().trainable)
    others = set(opt.hft.selected().trainable) - {name}
    p = model.get_parameter(name).requires_grad_(False)
    before = p.detach().clone()
    assert moved(model, opt) == others  # also with a gradient that was there, or came by hand
    for _ in range(6):
        train(model, opt, 2)
        assert name in opt.hft.selected().frozen
        assert not p.requires_grad
    row = next(row for row in opt.hft.selected() if row.name == name)
    assert not row.drawn
    assert torch.equal(p, before)
    assert opt.hft.round > 4
    opt.load_state_dict(opt.state_dict())
    assert not p.requires_grad
    opt.hft.next_round()
    assert not p.requires_grad
    opt.remove()
    assert {n for n, q in model.named_parameters() if not q.requires_grad} == {name}


def test_frozen_by_hand_just_before_something_else() -> None:
    """Nothing has to be called in between for it to be seen."""
    for do in (
        lambda opt: opt.hft.next_round(),
        lambda opt: opt.hft.selected(),
        lambda opt: opt.load_state_dict(opt.state_dict()),
        lambda opt: opt.step(),
        lambda opt: opt.remove(),
    ):
        model = fresh()
        opt = optx.wrap(adamw(model), HFT(model))
        model.head.weight.grad = torch.zeros_like(model.head.weight)  # a step without any gradient warns
        p = model.get_parameter(first_of(opt.hft.selected().trainable)).requires_grad_(False)
        model.head.bias.requires_grad_(False)
        do(opt)
        assert not p.requires_grad
        assert not model.head.bias.requires_grad


def test_thawed_by_hand_again() -> None:
    model = fresh()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    opt = optx.wrap(adamw(model), HFT(model))
    chosen = set(opt.hft.selected().trainable)
    model.blocks[0].requires_grad_(True)
    mine = {name for name in weights(model) if name.startswith("blocks.0")}
    assert moved(model, opt) == chosen | mine
    assert {row.name for row in opt.hft.next_round() if row.drawn} >= mine
    opt.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_round_froze_stays_frozen_when_thawed_by_hand() -> None:
    model = fresh()
    opt = optx.wrap(adamw(model), HFT(model))
    chosen = opt.hft.selected()
    model.requires_grad_(True)  # as a library does that froze the model for a while
    with pytest.warns(
        UserWarning, match=rf"HFT: 'blocks\.\S+' was thawed by hand \({len(chosen.frozen)} in all"
    ):
        assert moved(model, opt) == set(chosen.trainable)
    model.requires_grad_(True)
    assert moved(model, opt) == set(chosen.trainable)  # said once
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(chosen.trainable)
    opt.hft.next_round()
    model.requires_grad_(True)
    opt.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_and_thaw_in_words() -> None:
    """A weight that the round froze looks the same when a person freezes it too."""
    model = fresh()
    opt = optx.wrap(adamw(model), HFT(model))
    name, other = first_of(opt.hft.selected().frozen), first_of(reversed(opt.hft.selected().frozen))
    opt.hft.freeze(name)
    opt.hft.thaw(other)
    assert name in opt.hft.selected().frozen
    assert other in moved(model, opt)
    assert any(
        name not in opt.hft.next_round().frozen or other not in opt.hft.selected().trainable for _ in range(8)
    )
    for _ in range(8):
        assert name in opt.hft.next_round().frozen
    with pytest.raises(
        OptxError, match=r"HFT: freeze\('blocks\.0\.0\.wieght'\) names no .* Near: 'blocks\.0\.0\.w"
    ):
        opt.hft.freeze("blocks.0.0.wieght")
    opt.hft.thaw(name)
    assert name in moved(model, opt)
    opt.hft.freeze(name)
    opt.remove()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [name]


@pytest.mark.parametrize("when", ["before wrap", "after load", "here"])
def test_a_round_is_resumed_though_a_weight_was_frozen_in_it(when: str) -> None:
    model, other = fresh(), fresh()
    opt = optx.wrap(adamw(model), HFT(model, seed=3))
    opt.hft.next_round()
    chosen = opt.hft.selected()
    name = first_of(chosen.trainable)
    model.get_parameter(name).requires_grad_(False)
    train(model, opt, 2)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    if when == "here":
        other, resumed = model, opt
        before = copy.deepcopy((model.state_dict(), None))
        train(model, opt, 2)
        model.load_state_dict(before[0])
    else:
        if when == "before wrap":
            other.get_parameter(name).requires_grad_(False)
        resumed = optx.wrap(adamw(other), HFT(other, seed=3))
        other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    if when == "after load":
        other.get_parameter(name).requires_grad_(False)
    assert set(resumed.hft.selected().trainable) == set(chosen.trainable) - {name}
    assert moved(other, resumed) == set(chosen.trainable) - {name}


# ---- closures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", ["auto", False])
def test_gradients_that_a_closure_writes_by_hand(fused: Any) -> None:
    model = fresh()
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), HFT(model), fused=fused)
    before, chosen = weights(model), opt.hft.selected()

    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return torch.zeros(())

    opt.step(closure)
    assert {n for n, w in weights(model).items() if not torch.equal(w, before[n])} == set(chosen.trainable)


# ---- who holds whom --------------------------------------------------------------------------------------


def test_hft_does_not_hold_its_optimizer() -> None:
    model = fresh()
    hft = HFT(model)
    opt = optx.wrap(adamw(model), hft)
    train(model, opt, 1)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    with pytest.raises(TransformError, match=r"HFT: next_round|HFT: start_round\(\) needs an optimizer"):
        hft.next_round()


def test_an_optimizer_dropped_without_remove_leaves_no_half_behind() -> None:
    """Its frozen half is not what the person froze, for the HFT that comes next."""
    model = fresh()
    model.head.bias.requires_grad_(False)
    opt = optx.wrap(adamw(model), HFT(model))
    with pytest.raises(
        TransformError, match=r"another optimizer's HFT serves this model, .* Call remove\(\)"
    ):
        optx.wrap(adamw(model), HFT(model))
    assert moved(model, opt) == set(opt.hft.selected().trainable)
    del opt
    gc.collect()
    opt = optx.wrap(adamw(model), HFT(model, seed=5))
    assert {row.name for row in opt.hft.selected() if row.drawn} == {
        name for name in weights(model) if name.startswith("blocks")
    }
    opt.remove()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_a_copy_serves_the_copied_optimizer() -> None:
    model = fresh()
    opt = optx.wrap(adamw(model), HFT(model))
    other, copied = copy.deepcopy((model, opt))
    chosen = copied.hft.next_round()
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(chosen.trainable)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(opt.hft.selected().trainable)
    assert moved(other, copied) == set(chosen.trainable)
