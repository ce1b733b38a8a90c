"""`optx.scaling.mup` under schedulers, through checkpoints and copies, and with groups that come later."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mup_models import MLP, batch
from torch import nn
from torch.optim import lr_scheduler

import optx
from optx.scaling import Shapes

LR, DECAY = 3e-3, 0.1
# What these train multiplies no output: the rules of its groups are looked at, not what it learns.
pytestmark = pytest.mark.filterwarnings("ignore:.*no optx.MuReadout does:UserWarning")
RATIOS = [1.0, 0.25, 1.0]


def model_and_shapes(width: int = 64) -> tuple[nn.Module, Shapes]:
    torch.manual_seed(0)
    model = MLP(width)
    return model, optx.scaling.shapes(model, base=MLP(16), delta=MLP(32))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), **{"lr": LR, "weight_decay": DECAY, **options})


def plain(model: nn.Module, shapes: Shapes) -> Any:
    return optx.scaling.mup(adamw(model), shapes)


def wrapped(model: nn.Module, shapes: Shapes) -> Any:
    return optx.wrap(adamw(model), optx.MuAdamW(shapes), optx.PerpGrad())


both = pytest.mark.parametrize("make", [plain, wrapped])


def train(model: nn.Module, opt: Any, steps: int = 1, schedule: Any = None) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss = model(batch("mlp")).square().mean()
        loss.backward()
        opt.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(1.0)
        elif schedule is not None:
            schedule.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- schedulers --------------------------------------------------------------------------------------

MULTIPLYING: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 10),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, optx.scaling.group_lrs(opt, 0.01), total_steps=20),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.CosineAnnealingLR(opt, 8)], [3]
    ),
}


@both
@pytest.mark.parametrize("name", MULTIPLYING)
def test_schedules_that_multiply_keep_the_ratios(make: Callable[..., Any], name: str) -> None:
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    schedule = MULTIPLYING[name](opt)
    seen = set[float]()
    for _ in range(12):
        train(model, opt, 1, schedule)
        seen.add(first := opt.param_groups[0]["lr"])
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([first * r for r in RATIOS], abs=1e-12)
    assert len(seen) > 1


def test_the_schedules_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for name, more in (("cosine", {}), ("cosine_with_min_lr", {"min_lr": 1e-4}), ("polynomial", {})):
        model, shapes = model_and_shapes()
        opt = plain(model, shapes)
        schedule = transformers.get_scheduler(name, opt, 2, 10, scheduler_specific_kwargs=more)
        train(model, opt, 9, schedule)
        assert opt.param_groups[1]["lr"] == pytest.approx(opt.param_groups[0]["lr"] / 4)


ABSOLUTE: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "OneCycleLR": (0, lambda opt: lr_scheduler.OneCycleLR(opt, 0.01, total_steps=20)),
    "CyclicLR": (
        0,
        lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.01, cycle_momentum=False),
    ),
    "CosineAnnealingLR with eta_min": (1, lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10, eta_min=1e-4)),
    "ReduceLROnPlateau with min_lr": (
        2,
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, min_lr=1e-3),
    ),
}


@both
@pytest.mark.parametrize("name", ABSOLUTE)
def test_schedules_that_set_learning_rates_are_noticed(make: Callable[..., Any], name: str) -> None:
    """Before the first step whose ratios are others: nothing has moved by then."""
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    good, schedule = ABSOLUTE[name][0], ABSOLUTE[name][1](opt)
    train(model, opt, good, schedule)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(optx.OptxError, match=r"by their widths the second is 0\.25 times.*group_lrs"):
        train(model, opt)
    assert all(map(torch.equal, before, model.parameters()))


@both
def test_a_scheduler_made_before_is_refused(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    opt = adamw(model)
    schedule = lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    with pytest.raises(optx.OptxError, match="a learning rate scheduler was made"):
        optx.scaling.mup(opt, shapes) if make is plain else optx.wrap(opt, optx.MuAdamW(shapes))
    assert len(opt.param_groups) == 1
    train(model, opt, 2, schedule)


def test_where_nothing_changes_a_scheduler_may_be_there() -> None:
    model, shapes = model_and_shapes(16)
    opt = adamw(model)
    schedule = lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    optx.scaling.mup(opt, shapes, decay="none")
    train(model, opt, 2, schedule)
    assert opt.param_groups[0]["lr"] == LR / 3


@both
@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
def test_numbers_set_by_hand_are_noticed(make: Callable[..., Any], key: str) -> None:
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    for group in opt.param_groups:
        group[key] = group[key] * 3  # in proportion
    train(model, opt)
    for group in opt.param_groups:
        group[key] = 0.01
    with pytest.raises(optx.OptxError, match=key):
        train(model, opt)


@pytest.mark.parametrize("factory", [plain, wrapped])
def test_learning_rates_in_tensors(factory: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    rate = torch.tensor(LR)
    opt = adamw(model, lr=rate, capturable=False, foreach=False)
    opt = optx.scaling.mup(opt, shapes) if factory is plain else optx.wrap(opt, optx.MuAdamW(shapes))
    tensors = [g["lr"] for g in opt.param_groups]
    assert [float(t) for t in tensors] == pytest.approx([LR, LR / 4, LR], rel=1e-6)
    assert len({t.data_ptr() for t in tensors}) == 3
    schedule = lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    train(model, opt, 2, schedule)
    assert [float(g["lr"]) for g in opt.param_groups] == pytest.approx([LR / 4, LR / 16, LR / 4], rel=1e-6)


# ---- checkpoints -------------------------------------------------------------------------------------


@both
def test_a_run_resumed_in_its_middle_is_bit_identical(make: Callable[..., Any]) -> None:
    def begin() -> tuple[nn.Module, Any, Any]:
        model, shapes = model_and_shapes()
        opt = make(model, shapes)
        return model, opt, lr_scheduler.CosineAnnealingLR(opt, 20)

    model, opt, schedule = begin()
    train(model, opt, 4, schedule)
    saved = through_a_file([model.state_dict(), opt.state_dict(), schedule.state_dict()])
    train(model, opt, 4, schedule)
    again, other, rates = begin()
    again.load_state_dict(saved[0])
    rates.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in saved[1]["param_groups"]]
    train(again, other, 4, rates)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in other.param_groups]


@both
def test_a_checkpoint_without_the_multipliers_is_refused(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    unscaled = adamw(model)
    opt = make(model, shapes)
    before = [g["lr"] for g in opt.param_groups]
    with pytest.raises(optx.OptxError, match="the checkpoint has 1 param groups and this optimizer 3"):
        opt.load_state_dict(unscaled.state_dict())
    assert [g["lr"] for g in opt.param_groups] == before


@both
def test_a_checkpoint_of_as_many_groups_without_the_multipliers_is_refused(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    stripped = copy.deepcopy(opt.state_dict())
    for group in stripped["param_groups"]:
        for key in [key for key in group if key.startswith("optx.mu")]:
            del group[key]
    with pytest.raises(optx.OptxError, match="param group 0 is multiplied by nothing, and here by lr x 1"):
        opt.load_state_dict(stripped)
    train(model, opt)


@both
def test_a_checkpoint_of_other_multipliers_or_members_is_refused(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    other = copy.deepcopy(opt.state_dict())
    other["param_groups"][1]["optx.mu.lr"] = 0.125
    with pytest.raises(optx.OptxError, match=r"multiplied by lr x 0\.125, .*and here by lr x 0\.25"):
        opt.load_state_dict(other)
    reordered = torch.optim.AdamW(list(model.named_parameters())[::-1], lr=LR, weight_decay=DECAY)
    optx.scaling.mup(reordered, shapes)
    saved = reordered.state_dict()
    by_place = copy.deepcopy(opt.state_dict())
    for group, one in zip(by_place["param_groups"], (1, 2, 0), strict=True):
        assert group["optx.mu.members"] != saved["param_groups"][one]["optx.mu.members"] or one == 0
    by_place["param_groups"][1]["optx.mu.members"] = 1
    with pytest.raises(optx.OptxError, match="param group 1 has other parameters, or in another order"):
        opt.load_state_dict(by_place)


def test_loaded_into_a_plain_optimizer_they_are_taken_over() -> None:
    """Load, then mup: the numbers are multiplied already."""
    model, shapes = model_and_shapes()
    opt = plain(model, shapes)
    schedule = lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    train(model, opt, 2, schedule)
    saved = through_a_file(opt.state_dict())
    other, _ = model_and_shapes()
    names = dict(other.named_parameters())
    groups = [{"params": [(n, names[n]) for n in g["param_names"]]} for g in opt.param_groups]
    fresh = torch.optim.AdamW(groups)
    fresh.load_state_dict(saved)
    optx.scaling.mup(fresh, shapes)
    assert [g["lr"] for g in fresh.param_groups] == [LR / 2, LR / 8, LR / 2]
    again = torch.optim.AdamW(groups)
    again.load_state_dict(saved)
    with pytest.raises(optx.OptxError, match=r"'first\.weight' has been multiplied already"):
        optx.scaling.mup(again, shapes, decay="linear", eps="keep", parametrization="standard")


def test_a_plain_checkpoint_of_a_wrapped_one_and_back() -> None:
    model, shapes = model_and_shapes()
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes))
    train(model, opt, 2)
    other, _ = model_and_shapes()
    bare = plain(other, shapes)
    bare.load_state_dict(through_a_file(opt.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, opt)
    train(other, bare)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    opt.load_state_dict(through_a_file(bare.state_dict()))
    train(model, opt)


# ---- copies and groups that come later ---------------------------------------------------------------


def test_a_deepcopy_is_looked_after() -> None:
    model, shapes = model_and_shapes()
    for make in (plain, wrapped):
        twin, opt = copy.deepcopy((model, make(model, shapes)))
        if make is plain:
            optx.scaling.mup(opt, shapes)  # torch's copies have no hooks
        opt.param_groups[1]["lr"] = LR
        with pytest.raises(optx.OptxError, match="by their widths"):
            train(twin, opt)


@both
def test_a_group_that_comes_later_is_multiplied(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    names = dict(model.named_parameters())
    late = [(n, names.pop(n)) for n in ("hidden.weight", "hidden.bias")]
    opt = torch.optim.AdamW(list(names.items()), lr=LR, weight_decay=DECAY)
    opt = optx.scaling.mup(opt, shapes) if make is plain else optx.wrap(opt, optx.MuAdamW(shapes))
    opt.add_param_group({"params": late, "lr": 1e-4})
    train(model, opt)
    found = {n: (g["lr"], g["weight_decay"]) for g in opt.param_groups for n in g["param_names"]}
    assert found["hidden.weight"] == (1e-4 / 4, 2 * DECAY)
    assert found["hidden.bias"] == (1e-4, 0.0)
    assert found["back.weight"] == (LR / 4, 2 * DECAY)


@both
def test_a_group_of_what_the_shapes_do_not_have(make: Callable[..., Any]) -> None:
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    extra = nn.Parameter(torch.ones(2))
    add = functools.partial(opt.add_param_group, {"params": [("extra", extra)]})
    if make is plain:
        add()
        add = functools.partial(train, model, opt)
    with pytest.raises(optx.OptxError, match="the shapes have no parameter 'extra'"):
        add()
    assert len(opt.param_groups) == (4 if make is plain else 3)
    model, shapes = model_and_shapes()
    opt = make(model, shapes)
    opt.add_param_group({"params": [("extra", extra)], "mu": False})
    train(model, opt)
    assert opt.param_groups[-1]["lr"] == LR


def test_the_end_of_a_cosine_is_no_breach() -> None:
    model, shapes = model_and_shapes()
    opt = plain(model, shapes)
    schedule = lr_scheduler.CosineAnnealingLR(opt, 7)
    train(model, opt, 30, schedule)
    assert math.isfinite(opt.param_groups[0]["lr"])


def test_group_lrs_are_in_the_ratios() -> None:
    model, shapes = model_and_shapes()
    opt = plain(model, shapes)
    assert optx.scaling.group_lrs(opt, 0.1) == [0.1, 0.025, 0.1]
    with pytest.raises(optx.OptxError, match="no multipliers"):
        optx.scaling.group_lrs(adamw(model), 0.1)
    with pytest.raises(optx.OptxError, match="lr is 'big'"):
        optx.scaling.group_lrs(opt, "big")  # type: ignore[arg-type]
