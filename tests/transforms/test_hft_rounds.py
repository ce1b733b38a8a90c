"""HFT across rounds: moments that are kept, groups that come later, and flags that a person sets."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES, BY_NAME, Base, set_train
from hft_models import Residual, assert_equal, fresh, weights
from torch import Tensor, nn

import optx
from optx import OptxError, TransformError
from optx.transforms.hft import HFT

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, opt: Any, steps: int, closure: bool = False) -> None:
    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    set_train(opt)
    for _ in range(steps):
        if closure:
            opt.step(evaluate)
        else:
            evaluate()
            opt.step()
    opt.zero_grad()


def push(model: nn.Module, opt: Any, g: float = 1.0) -> None:
    """A step with gradients set by hand, for every parameter."""
    for p in model.parameters():
        p.grad = torch.full_like(p, g)
    opt.step()


def moved(model: nn.Module, opt: Any) -> set[str]:
    before = weights(model)
    push(model, opt)
    return {name for name, w in weights(model).items() if not torch.equal(w, before[name])}


def state_of(opt: Any, p: Tensor) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in opt.state.get(p, {}).items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


# ---- moments through a freeze ----------------------------------------------------------------------------


class Scalars(nn.Module):
    """Two blocks of one number each: a round trains one of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        one = [nn.ModuleDict({"fc": nn.Linear(1, 1, bias=False, dtype=dtype)}) for _ in range(2)]
        self.blocks = nn.ModuleList(one)
        for p in self.parameters():
            nn.init.ones_(p)


def start_round_that(opt: Any, name: str, trains: bool) -> None:
    number = opt.hft.round + 1
    while (name in opt.hft.start_round(number).trainable) != trains:
        number += 1


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("reset", "value"), [(False, 0.65690953), (True, 0.76655611)])
def test_one_scalar_through_a_frozen_round(reset: bool, value: float, dtype: torch.dtype, fused: Any) -> None:
    """From 1: three steps of g = 1, five frozen, then g = -2; beside AdamW on that scalar alone."""
    model, name = Scalars(dtype), "blocks.0.fc.weight"
    w, other = model.get_parameter(name), nn.Parameter(torch.ones(1, 1, dtype=dtype))
    opt = optx.wrap(
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
        HFT(model, reset_state=reset),
        fused=fused,
    )
    alone = torch.optim.AdamW([other], lr=0.1, weight_decay=0.1)

    def both(g: float) -> None:
        push(model, opt, g)
        other.grad = torch.full_like(other, g)
        alone.step()

    start_round_that(opt, name, trains=True)
    for _ in range(3):
        both(1.0)
    start_round_that(opt, name, trains=False)
    held = w.item()
    for _ in range(5):
        push(model, opt)
    assert w.item() == held
    start_round_that(opt, name, trains=True)
    if reset:
        alone.state.clear()
    both(-2.0)
    assert w.item() == pytest.approx(value, abs=6e-8)
    torch.testing.assert_close(w.detach(), other.detach(), rtol=0, atol=2e-7)


def plain_round(opt: Any, before: Any, base: torch.optim.Optimizer, twin: nn.Module) -> None:
    """Make a plain optimizer's model that of the round: frozen ones get no gradient."""
    for name, p in twin.named_parameters():
        p.requires_grad_(name in before.trainable)


def kept(base: Base) -> bool:
    return not (base.modes or base.closure)


@pytest.mark.parametrize("base", [b for b in BASES if kept(b)], ids=str)
def test_every_base_goes_on_where_it_was(base: Base) -> None:
    """With reset_state=False a run is that of the base itself, which sees no gradient of the frozen half."""
    model, twin = fresh(), fresh()
    plain = base.make(twin.parameters())
    opt = optx.wrap(base.make(model.parameters()), HFT(model, seed=1, reset_state=False), fused=False)
    params = dict(model.named_parameters())
    for _ in range(4):
        chosen = opt.hft.selected()
        plain_round(opt, chosen, plain, twin)
        before = weights(model), {name: state_of(opt, params[name]) for name in chosen.frozen}
        train(model, opt, 2)
        train(twin, plain, 2)
        assert_equal(weights(model), weights(twin))
        for name in chosen.frozen:
            assert torch.equal(params[name], before[0][name])
            assert same_state(state_of(opt, params[name]), before[1][name])
        opt.hft.next_round()


@pytest.mark.parametrize("base", BASES, ids=str)
def test_every_base_starts_anew(base: Base) -> None:
    """With reset_state=True each round is a run of its own; what is frozen neither moves nor has state."""
    model = fresh()
    opt = optx.wrap(base.make(model.parameters()), HFT(model, seed=1), fused=False)
    for _ in range(3):
        chosen = opt.hft.selected()
        before = weights(model)
        train(model, opt, 2, base.closure)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name in chosen.frozen), name
            assert name in chosen.trainable or not state_of(opt, p)
        opt.hft.next_round()


@pytest.mark.parametrize("name", ["LBFGS", "schedulefree.AdamW"])
def test_state_that_moves_weights_is_not_kept(name: str) -> None:
    model = fresh()
    with pytest.raises(
        TransformError, match=r"HFT: reset_state=False keeps the state of frozen .* Leave reset"
    ):
        optx.wrap(BY_NAME[name].make(model.parameters()), HFT(model, reset_state=False))
    assert all(p.requires_grad for p in model.parameters())


def test_lbfgs_forgets_its_history_when_hft_comes() -> None:
    model = fresh()
    base = BY_NAME["LBFGS"]
    warm = base.make(model.parameters())
    train(model, warm, 2, closure=True)
    opt = optx.wrap(warm, HFT(model))
    before = weights(model)
    train(model, opt, 2, closure=True)
    for name in opt.hft.selected().frozen:
        assert torch.equal(model.get_parameter(name), before[name])


class Slow(torch.optim.SGD):
    """As Lookahead: every second step it puts each weight back by half of its way, gradient or not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            slow = state.setdefault("slow", p.detach().clone())
            p.lerp_(slow, 0.5)
        return loss


def test_a_base_that_writes_to_frozen_weights_is_told_of() -> None:
    model = fresh()
    opt = optx.wrap(Slow(model.parameters(), lr=0.1), HFT(model, reset_state=False), fused=False)
    with pytest.warns(
        UserWarning, match="this step wrote to frozen weights.* Slow, .*leave reset_state=True"
    ):
        train(model, opt, 1)
    train(model, opt, 1)  # once


# ---- checkpoints of kept moments -------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(model: nn.Module, **more: Any) -> Any:
    return optx.wrap(adamw(model), HFT(model, rounds_every=4, reset_state=False, **more))


@pytest.mark.parametrize("steps", [1, 5, 6, 9], ids=lambda n: f"saved after {n}")
def test_kept_moments_are_in_the_state_dict(steps: int) -> None:
    model, other = fresh(), fresh()
    opt, resumed = run(model), run(other)
    train(model, opt, steps)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    frozen = {n: state_of(opt, model.get_parameter(n)) for n in opt.hft.selected().frozen}
    assert steps < 5 or any(frozen.values())
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for name, state in frozen.items():
        assert same_state(state_of(resumed, other.get_parameter(name)), state)
    train(model, opt, 8)
    train(other, resumed, 8)
    assert_equal(weights(model), weights(other))
    plain = adamw(fresh())
    plain.load_state_dict(saved["opt"])  # the base alone reads it too
    assert sum(bool(state) for state in plain.state.values()) == len(saved["opt"]["state"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as no_dist=True says
@pytest.mark.parametrize("reset", [False, True])
def test_distributed_checkpoint_loads_into_a_fresh_optimizer(reset: bool, tmp_path: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def start() -> tuple[nn.Module, Any]:
        model = fresh()
        return model, optx.wrap(adamw(model), HFT(model, rounds_every=4, reset_state=reset))

    model, opt = start()
    train(model, opt, 6)
    state = get_optimizer_state_dict(model, opt)
    saved = copy.deepcopy((model.state_dict(), state))
    dcp.save({"opt": state}, checkpoint_id=tmp_path, no_dist=True)
    train(model, opt, 7)
    options = StateDictOptions(strict=False)
    for way in ("memory", "file"):
        other, resumed = start()
        other.load_state_dict(saved[0])
        with resumed.hft.loading():
            assert all(p.requires_grad for p in other.parameters())
            loaded = saved[1]
            if way == "file":
                loaded = get_optimizer_state_dict(other, resumed)
                planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
                dcp.load({"opt": loaded}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
            set_optimizer_state_dict(other, resumed, copy.deepcopy(loaded), options=options)
        assert_equal(weights(other), dict(saved[0]))
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(
            resumed.hft.selected().trainable
        )
        train(other, resumed, 7)
        assert_equal(weights(model), weights(other))


def test_distributed_checkpoint_without_loading_is_told() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = fresh()
    opt = run(model)
    train(model, opt, 6)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    other = fresh()
    resumed = run(other)
    resumed.hft.start_round(1)
    with pytest.warns(UserWarning, match=r"the state of \d+ frozen weights, and 0 came: .*hft\.loading"):
        set_optimizer_state_dict(other, resumed, saved)


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
