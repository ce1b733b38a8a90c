"""Wrapped again, taken off, dropped, hooked, compiled, stepped by its old name: an optimizer's life."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bases import LooseAdam
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import optx

both = pytest.mark.parametrize("fused", ["cpu", False], ids=["fused", "foreach"])
SETTINGS: dict[str, Any] = {"skip_nonfinite": True, "rounding": "kahan", "fused": "cpu"}


def weight(n: int = 6) -> nn.Parameter:
    p = nn.Parameter(torch.linspace(1, 2, n))
    p.grad = torch.ones(n)
    return p


def adamw(p: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p], lr=0.01, weight_decay=0)


# ---- wrapped again, and by whom -----------------------------------------------------------------------


@pytest.mark.parametrize("given", [*SETTINGS, None])
def test_wrapping_again_keeps_settings_that_are_not_given_anew(given: str | None) -> None:
    p = weight()
    opt = optx.wrap(adamw(p), optx.PerpGrad(), **SETTINGS)
    anew: dict[str, Any] = {"skip_nonfinite": False, "rounding": "nearest", "fused": "auto"}
    again = optx.wrap(opt, optx.AdamR(), **({given: anew[given]} if given else {}))
    assert again is opt
    for key, value in SETTINGS.items():
        assert getattr(opt, key) == (anew[key] if key == given else value)
    assert [t.name for t in opt.transforms] == ["adamr", "perp_grad"]
    if given is None:
        assert p.grad is not None
        p.grad[0] = float("nan")
        before = p.detach().clone()
        opt.step()
        assert opt.skipped_last
        assert torch.equal(p, before)


def test_wrapping_again_that_fails_leaves_it_as_it_was() -> None:
    p = weight()
    opt = optx.wrap(adamw(p), optx.PerpGrad(), **SETTINGS)
    for again, settings in (((optx.PerpGrad(),), {}), ((), {"fused": "triton"}), ((), {"rounding": "up"})):
        with pytest.raises(optx.OptxError):
            optx.wrap(opt, *again, **settings)
        assert {key: getattr(opt, key) for key in SETTINGS} == SETTINGS
        assert [t.name for t in opt.transforms] == ["perp_grad"]
    opt.step()


def test_the_same_base_twice_is_refused_until_it_is_given_back() -> None:
    p = weight()
    base = adamw(p)
    opt = optx.wrap(base, optx.PerpGrad())
    with pytest.raises(optx.TransformError, match="this AdamW is wrapped already"):
        optx.wrap(base)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with pytest.raises(optx.TransformError, match="wrapped already"):
            optx.wrap(copied.base)
    alone = copy.deepcopy(base)  # nobody's
    assert optx.wrap(alone, optx.AdamR()).base is alone
    assert opt.remove() is base
    optx.wrap(base, optx.PerpGrad()).step()


def test_a_base_whose_wrapper_is_gone_is_free() -> None:
    base = adamw(weight())
    opt = optx.wrap(base, optx.PerpGrad())
    del opt
    base.step()
    optx.wrap(base, optx.PerpGrad()).step()


def test_a_step_after_remove_says_so() -> None:
    p = weight()
    opt = optx.wrap(adamw(p), optx.PerpGrad())
    opt.step()
    base = opt.remove()
    assert opt.remove() is base
    before = p.detach().clone()
    with pytest.raises(optx.OptxError, match=r"step\(\) after remove\(\)"):
        opt.step()
    copied = copy.deepcopy(opt)
    with pytest.raises(optx.OptxError, match=r"step\(\) after remove\(\)"):
        copied.step()
    assert torch.equal(p, before)
    base.step()
    assert not torch.equal(p, before)


# ---- freed --------------------------------------------------------------------------------------------


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def stepped() -> tuple[nn.Parameter, optx.Wrapped]:
    p = weight(1000)
    opt = optx.wrap(adamw(p), optx.PerpGrad(), optx.AdamR())
    opt.step()
    return p, opt


def plain(p: nn.Parameter, opt: optx.Wrapped) -> None:
    pass


def loaded(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()


def removed(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.remove().step()


def again(p: nn.Parameter, opt: optx.Wrapped) -> None:
    optx.wrap(opt, skip_nonfinite=True).step()


def failed(p: nn.Parameter, opt: optx.Wrapped) -> None:
    hook = opt.base.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    hook.remove()


def on_the_other_path(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.fused = False
    opt.step()


@pytest.mark.long(keep=5)
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("life", [plain, loaded, removed, again, failed, on_the_other_path])
def test_weights_and_moments_are_freed_without_the_collector(life: Any) -> None:
    def one() -> list[weakref.ref[Any]]:
        p, opt = stepped()
        life(p, opt)
        return [weakref.ref(p), weakref.ref(opt), weakref.ref(opt.state[p]["exp_avg"])]

    one()  # what a first one imports
    gc.collect()
    assert [ref() for ref in one()] == [None] * 3


# ---- hooks --------------------------------------------------------------------------------------------


class Nested(torch.optim.AdamW):
    """torch puts hooks around the step of each class."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Nested, torch.optim.RAdam, torch.optim.LBFGS])
@both
def test_every_hook_runs_once(kind: Any, closure: bool, fused: Any) -> None:
    if fused and kind is not torch.optim.AdamW:
        pytest.skip("has no fused form")
    p = weight()
    opt = optx.wrap(kind([p]), fused=fused)
    calls: list[tuple[str, Any]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("all, before", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("all, after", o))),
        opt.register_step_pre_hook(lambda o, *_: calls.append(("own, before", o))),
        opt.register_step_post_hook(lambda o, *_: calls.append(("own, after", o))),
        opt.base.register_step_pre_hook(lambda o, *_: calls.append(("base, before", o))),
        opt.base.register_step_post_hook(lambda o, *_: calls.append(("base, after", o))),
    ]

    def evaluate() -> torch.Tensor:
        return p.square().sum()

    try:
        for _ in range(2):
            calls.clear()
            if closure or kind is torch.optim.LBFGS:
                opt.step(evaluate)
            else:
                opt.step()
            # Those of all optimizers run as often as torch runs them: for every class that is stepped.
            names = [name for name, o in calls if not (kind is Nested and "all" in name and o is opt.base)]
            assert sorted(names) == sorted(set(names))
            assert names.count("all, before") == names.count("all, after") == 1
            assert names.index("own, before") < names.index("base, before") < names.index("base, after")
            assert {id(o) for name, o in calls if name.startswith("base")} == {id(opt.base)}
    finally:
        for handle in handles:
            handle.remove()


# ---- stepped by its old name --------------------------------------------------------------------------


@both
def test_the_base_is_not_stepped_by_its_old_name(fused: Any) -> None:
    p = weight()
    base = adamw(p)
    opt = optx.wrap(base, optx.PerpGrad(), fused=fused)
    before = p.detach().clone()
    for owner in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with pytest.raises(optx.OptxError, match=r"step\(\) was called on the AdamW that optx.wrap wraps"):
            owner.base.step()
    assert torch.equal(p, before)
    opt.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("early", [True, False])
def test_a_scheduler_on_the_base_does_not_open_the_door(early: bool) -> None:
    """It puts a function of its own over ``step``."""
    p = weight()
    base = adamw(p)
    if early:
        scheduler = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
    opt = optx.wrap(base, optx.PerpGrad())
    if not early:
        scheduler = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
    before = p.detach().clone()
    with pytest.raises(optx.OptxError, match="Call step"):
        base.step()
    assert torch.equal(p, before)
    opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.005
    opt.step()


def test_grad_scaler_and_accelerate_on_the_base_are_refused_too() -> None:
    p = weight()
    base = adamw(p)
    opt = optx.wrap(base, optx.PerpGrad())
    before = p.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.square().sum()).backward()
    with pytest.raises(optx.OptxError, match="Call step"):
        scaler.step(base)
    assert torch.equal(p, before)
    accelerate = pytest.importorskip("accelerate")
    held = accelerate.Accelerator(cpu=True).prepare(base)
    with pytest.raises(optx.OptxError, match="Call step"):
        held.step()
    assert torch.equal(p, before)
    opt.step()


# ---- compiled, saved, idle ----------------------------------------------------------------------------


@both
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch.compile's own
def test_a_step_inside_torch_compile(fused: Any) -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), optx.PerpGrad(), fused=fused)

        def train_step(x: torch.Tensor) -> torch.Tensor:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            return loss

        run = torch.compile(train_step, backend="eager") if compiled else train_step
        return [float(run(torch.ones(2, 3)).detach()) for _ in range(4)]

    got = losses(compiled=True)
    assert got == losses(compiled=False)
    assert got == sorted(got, reverse=True)
    assert len(set(got)) == 4


@pytest.mark.parametrize("served", [True, False], ids=["served", "left out"])
@both
def test_distributed_checkpoint_of_sgd_with_a_layer_that_never_had_a_gradient(
    served: bool, fused: Any
) -> None:
    """Plain SGD keeps no state; where ours is there for some parameters, torch asks for it of all."""

    def make() -> tuple[nn.Module, optx.Wrapped]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
        groups = [
            {"params": list(model["used"].named_parameters("used"))},
            {"params": list(model["idle"].named_parameters("idle")), "adamr": served},
        ]
        base = torch.optim.SGD(groups, lr=0.1)
        return model, optx.wrap(base, optx.PerpGrad(), optx.AdamR(0.1, normalize=False), fused=fused)

    def train(model: Any, opt: optx.Wrapped) -> None:
        opt.zero_grad()
        model["used"](torch.ones(2, 3)).square().sum().backward()
        opt.step()

    model, opt = make()
    train(model, opt)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, opt)))
    other, fresh = make()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    get_optimizer_state_dict(other, fresh)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    set_optimizer_state_dict(other, fresh, saved[1])
    other.load_state_dict(saved[0])
    for _ in range(2):
        train(model, opt)
        train(other, fresh)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        if served or "used" in name:
            a, b = (o.slot(w, o.adamr, "anchor") for o, w in ((opt, p), (fresh, q)))
            assert torch.equal(a, b), name
    plain = torch.optim.SGD(
        [{"params": g["params"]} for g in fresh.param_groups], lr=0.1
    )  # the file of a base that keeps nothing
    plain.load_state_dict(copy.deepcopy(fresh.state_dict()))
    plain.step()


@both
@pytest.mark.parametrize("kind", [torch.optim.AdamW, LooseAdam])
def test_a_step_without_any_gradient_warns_once(kind: Any, fused: Any) -> None:
    if fused and kind is LooseAdam:
        pytest.skip("has no fused form")
    p = weight()
    opt = optx.wrap(kind([p]), optx.PerpGrad(), fused=fused)
    opt.step()
    opt.zero_grad()
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="found no gradient on any parameter"):
        opt.step()
    opt.step()  # a warning would be an error here
    assert torch.equal(p, before)


@pytest.mark.long
def test_hooks_of_all_optimizers_run_once_where_torch_compile_wrapped_a_step() -> None:
    """Once anything was compiled, torch puts another wrapper around LBFGS's step."""
    code = """
import torch, optx
from torch.optim.optimizer import register_optimizer_step_post_hook
p = torch.nn.Parameter(torch.ones(2))
torch.optim.LBFGS([p])  # from here on its step has torch's hooks
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
ran = []
register_optimizer_step_post_hook(lambda *_: ran.append(1))
opt = optx.wrap(torch.optim.LBFGS([p]))
def closure():
    opt.zero_grad()
    loss = p.square().sum()
    loss.backward()
    return loss
opt.step(closure)
print(len(ran))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.stdout.split() == ["1"], done.stderr
