"""HFT with `reset_state=False`: moments kept through a freeze, for every base, and in checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bases import BASES, BY_NAME, Base, through_a_file
from hft_models import assert_equal, fresh, weights
from hft_runs import adamw, push, same_state, state_of, train
from torch import nn

import optx
from optx import TransformError
from optx.transforms.hft import HFT

# ---- moments through a freeze --------------------------------------------------------------------------


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


@pytest.mark.long(keep=2)
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
    served = {id(p) for group in opt.param_groups for p in group["params"]}  # of Muon's matrices only
    for _ in range(3):
        chosen = opt.hft.selected()
        before = weights(model)
        train(model, opt, 2, base.closure)
        for name, p in model.named_parameters():
            stays = name in chosen.frozen or id(p) not in served
            assert torch.equal(p, before[name]) == stays, name
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


# ---- checkpoints of kept moments -----------------------------------------------------------------------


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
