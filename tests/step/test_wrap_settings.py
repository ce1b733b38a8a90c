"""What can't change once an optimizer is wrapped is refused, not ignored; what differs is shown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hft_models import fresh
from torch import nn
from user_rules import SoftClip, soft_sign

import optx
from optx import HFT, AdamR, PerpGrad, TransformError


def base(model: nn.Module | None = None) -> torch.optim.Optimizer:
    model = model or nn.Linear(3, 2)
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)


def with_gradients(opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    return opt


# ---- one transform, one optimizer ------------------------------------------------------------------------


@pytest.mark.long(keep=5)
@pytest.mark.parametrize("make", [AdamR, PerpGrad, SoftClip], ids=lambda t: t.__name__)
@pytest.mark.parametrize("cycle", [False, True])
def test_one_transform_serves_one_optimizer(make: Any, cycle: bool) -> None:
    t = make()
    first, other = optx.wrap(base(), t), base()
    if cycle:  # as some schedulers make one
        first.me = first  # type: ignore[attr-defined]
    groups = [dict(group) for group in other.param_groups]
    with pytest.raises(TransformError, match=rf"wrap: this {make.__name__}\(.*\) serves another optimizer"):
        optx.wrap(other, t)
    assert [group.keys() for group in other.param_groups] == [group.keys() for group in groups]
    wrapped = optx.wrap(base(), *([] if make is PerpGrad else [PerpGrad()]))
    with pytest.raises(TransformError, match="serves another optimizer already"):
        optx.wrap(wrapped, t)
    option = next(iter(t.options))
    setattr(t, option, 0.0)  # still the first one's
    assert first.param_groups[0][f"{t.name}_{option}"] == 0.0
    del first  # not removed, but gone
    assert getattr(optx.wrap(other, t), t.name) is t


def test_a_transform_is_free_again_after_remove_and_copies_are_others() -> None:
    t = AdamR()
    opt = optx.wrap(base(), t)
    assert optx.wrap(opt, PerpGrad()) is opt  # it is its own
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optx.wrap(base(), copy.deepcopy(t))
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with_gradients(again).step()
        with pytest.raises(TransformError, match="serves another optimizer"):
            optx.wrap(base(), again.adamr)
        gone = copy.deepcopy(again)
        gone.remove()
        copied = copy.deepcopy(gone)
        optx.wrap(base(), copied.transforms[0])  # a copy of what was removed is free too
    opt.remove()
    assert optx.wrap(base(), t).adamr is t


def test_a_wrap_that_failed_keeps_no_transform() -> None:
    t = SoftClip()
    with pytest.raises(TransformError, match="no trainable parameter"):
        optx.wrap(base(nn.Linear(2, 2).requires_grad_(False)), t)
    assert optx.wrap(base(), t).soft_clip is t


# ---- settings that are read once --------------------------------------------------------------------------


class Counts(optx.Transform):
    """Keeps accounts in public attributes, an argument of its constructor among them."""

    name = "counts"
    rules: ClassVar = {"gradient": soft_sign}

    def __init__(self, mode: str = "a", steps: int = 0) -> None:
        self.options = {"limit": 1.0}
        self.mode, self.steps = mode, steps
        self.note = ""

    def after_step(self, optimizer: optx.Wrapped) -> None:
        self.steps += 1
        self.last = "stepped"  # first written here


class Below(Counts):
    """Inherits a constructor's arguments."""

    def __init__(self, depth: int = 1, **others: Any) -> None:
        super().__init__(**others)
        self.depth = depth


LATE: list[tuple[Callable[[], optx.Transform], str, Any]] = [
    (AdamR, "norm", "l1"),
    (AdamR, "normalize", False),
    (AdamR, "anchor", "zero"),
    (AdamR, "save_anchor", False),  # kept under another name
    (AdamR, "slots", {}),
    (PerpGrad, "options", {"rescale": False}),
    (PerpGrad, "rules", {}),
    (PerpGrad, "name", "perp"),
    (SoftClip, "limits", {}),
    (Counts, "mode", "b"),
    (Counts, "steps", 7),
    (Below, "mode", "b"),
    (Below, "depth", 2),
    *[
        (lambda: HFT(fresh()), name, value)
        for name, value in {
            "model": nn.Linear(2, 2),
            "ratio": 0.3,
            "level": "layer",
            "seed": 3,
            "reset_state": False,
            "balance": "params",
            "blocks": "blocks",
        }.items()
    ],
]


@pytest.mark.parametrize(("make", "name", "value"), LATE, ids=[name for _, name, _ in LATE])
def test_a_setting_that_is_read_once_is_refused_after_wrap(make: Any, name: str, value: Any) -> None:
    t = make()
    opt = optx.wrap(base(getattr(t, "model", None)), t)
    before = getattr(t, name, None)
    with pytest.raises(TransformError, match=f"{type(t).__name__}: '{name}' was read when .*wrap again"):
        setattr(t, name, value)
    assert getattr(t, name, None) is before
    opt.remove()
    if name != "seed":  # read-only
        setattr(t, name, value)  # it is nobody's, and read by the next wrap


def test_misspelt_settings_are_told_the_near_one() -> None:
    opt = optx.wrap(base(), AdamR())
    with pytest.raises(TransformError, match=r"AdamR: 'normalise' is no option of it\. Is 'normalize' meant"):
        opt.adamr.normalise = False


def test_a_transforms_own_writes_go_on(recwarn: pytest.WarningsRecorder) -> None:
    opt = optx.wrap(base(), Counts())
    with_gradients(opt).step()
    opt.step()
    opt.counts.note = "a person's own, of no constructor"
    opt.counts._private = 1
    opt.counts.limit = 0.5
    assert (opt.counts.steps, opt.counts.last, opt.param_groups[0]["counts_limit"]) == (2, "stepped", 0.5)


def test_rounds_every_may_be_set() -> None:
    model = fresh()
    opt = optx.wrap(base(model), HFT(model))
    opt.hft.rounds_every = 2
    for _ in range(4):
        with_gradients(opt).step()
    assert opt.hft.round == 2
    with pytest.raises(optx.OptxError, match="HFT: rounds_every is 0; it must be at least 1"):
        opt.hft.rounds_every = 0
    assert opt.hft.rounds_every == 2


# ---- what belongs to the wrapper ---------------------------------------------------------------------------


def test_what_would_hide_a_transform_is_refused() -> None:
    opt = optx.wrap(base(), AdamR(), SoftClip())
    for value in (AdamR(weight=1.0), None, 0.2):
        with pytest.raises(TransformError, match=r"opt\.adamr is the transform that acts .* hide it"):
            opt.adamr = value
    for name, value in (("transforms", ()), ("base", base())):
        with pytest.raises(TransformError, match=rf"opt\.{name} was settled when the optimizer was wrapped"):
            setattr(opt, name, value)
    opt.adamr = opt.adamr
    opt.note = "a person's own"
    again = copy.deepcopy(opt)
    with pytest.raises(TransformError, match="hide it"):
        again.soft_clip = SoftClip()
    assert isinstance(opt.adamr, AdamR)


SHOWN: dict[str, dict[str, Any]] = {
    "rounding='kahan'": {"rounding": "kahan"},
    "rounding='nearest'": {"rounding": "nearest"},
    "skip_nonfinite=True": {"skip_nonfinite": True},
    "fused='cpu'": {"fused": "cpu"},
    "fused=True": {"fused": True},
    "fused=False": {"fused": False},
}


@pytest.mark.parametrize("shown", SHOWN)
def test_plan_and_repr_show_settings_that_are_not_the_default(shown: str) -> None:
    model = nn.Linear(3, 2).bfloat16()
    opt = optx.wrap(base(model), PerpGrad(), **SHOWN[shown])
    for text in (str(opt.plan()), repr(opt)):
        assert shown in text
        assert [other for other in SHOWN if other in text] == [shown]
    optx.wrap(opt, fused="auto", skip_nonfinite=False, rounding="stochastic")
    for text in (str(opt.plan()), repr(opt)):
        assert not [other for other in SHOWN if other in text]


# ---- what a transform's init_slot makes --------------------------------------------------------------------


@optx.rule(writes=("g", "trace"))
def traced(g: Any, trace: Any, scale: Any) -> Any:
    return g * scale + trace, g


def making(value: Any, only: str, hooks_only: bool) -> optx.Transform:
    class Made(optx.Transform):
        name = "made"
        slots: ClassVar = {"trace": optx.like_weight(), "scale": optx.per_tensor()}
        rules: ClassVar = {} if hooks_only else {"gradient": traced}

        def init_slot(self, name: str, p: torch.Tensor, optimizer: optx.Wrapped) -> Any:
            return value(p) if name == only else super().init_slot(name, p, optimizer)

    return Made()


WRONG: dict[str, tuple[Any, str, str]] = {
    "shape": (lambda p: torch.zeros(5), "trace", r"a tensor of shape \(5,\) .* the weight's shape, \(2, 3\)"),
    "number": (lambda p: 0.5, "trace", r"0\.5 .* the weight's shape, \(2, 3\)"),
    "none": (lambda p: None, "trace", r"None .* the weight's shape, \(2, 3\)"),
    "scalar for a weight": (lambda p: p.new_zeros(()), "trace", r"shape \(\) .* the weight's shape"),
    "turned": (lambda p: torch.zeros(3, 2), "trace", r"shape \(3, 2\) .* the weight's shape"),
    "weight for a scalar": (torch.zeros_like, "scale", r"shape \(2, 3\) .* of one number"),
    "number for a scalar": (lambda p: 1, "scale", "1 .* of one number"),
    "none for a scalar": (lambda p: None, "scale", "None .* of one number"),
}


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("hooks_only", [False, True], ids=["ruled", "hooks only"])
@pytest.mark.parametrize("kind", WRONG)
def test_init_slot_that_returns_something_else_is_named_at_wrap(
    kind: str, hooks_only: bool, fused: Any
) -> None:
    value, slot, said = WRONG[kind]
    plain = base()
    with pytest.raises(TransformError, match=rf"Made: init_slot\('{slot}'\) returned .*{said}"):
        optx.wrap(plain, making(value, slot, hooks_only), fused=fused)
    with_gradients(plain).step()  # it is the person's again
    assert not [key for group in plain.param_groups for key in group if key.startswith(("made", "optx"))]


def test_init_slot_may_give_one_number_in_any_shape() -> None:
    opt = optx.wrap(base(), making(lambda p: torch.ones(1, 1), "scale", False), fused=False)
    with_gradients(opt).step()
    p = opt.param_groups[0]["params"][0]
    assert opt.slot(p, opt.made, "scale").shape == ()


def test_a_number_that_is_taken_anew_is_looked_at_too() -> None:
    opt = optx.wrap(base(), AdamR(), fused=False)
    with_gradients(opt).step()
    object.__setattr__(opt.adamr, "init_slot", lambda *_: None)
    opt.state[opt.param_groups[0]["params"][0]]["exp_avg_sq"].mul_(2.0)
    with pytest.raises(TransformError, match=r"AdamR: init_slot\('v_sum'\) returned None"):
        opt.step()
