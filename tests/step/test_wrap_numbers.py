"""Numbers are read when they are used, of every kind that torch takes, and never 0 in silence."""

from __future__ import annotations

import copy
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optx

both = pytest.mark.parametrize("fused", ["cpu", False], ids=["fused", "foreach"])
KINDS: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "0-d array": np.array,
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "Decimal": lambda x: Decimal(str(x)),
    "Fraction": lambda x: Fraction(str(x)),
}


def run(key: str, value: Any, later: bool, wrap: Any) -> list[float]:
    """Two steps of AdamW with one setting of another kind, from the start or from the second step on."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "foreach": False}
    base = torch.optim.AdamW([p], **(settings if later else {**settings, key: value}))
    opt = wrap(base)
    for number in range(2):
        if number and later:
            opt.param_groups[0][key] = value
        p.grad = torch.ones(2)
        opt.step()
    return p.tolist()


CHAINS: dict[str, Any] = {
    "fused": lambda base: optx.wrap(base, fused="cpu"),
    "foreach": lambda base: optx.wrap(base, fused=False),
    "AdamR": lambda base: optx.wrap(base, optx.AdamR(0.0), fused="cpu"),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*both pulls act")
def test_as_torch_takes_it_or_refused(kind: str, key: str, chain: str) -> None:
    value = KINDS[kind](0.2)
    wanted = run(key, 0.2, later=False, wrap=lambda base: base)
    later = run(key, 0.2, later=True, wrap=lambda base: base)
    assert wanted != run(key, 0.1, later=False, wrap=lambda base: base)
    for when, right in ((False, wanted), (True, later)):
        try:
            got = run(key, value, when, CHAINS[chain])
        except (optx.OptxError, TypeError, ValueError, RuntimeError):
            with pytest.raises((TypeError, ValueError, RuntimeError)):  # then torch does not take it either
                run(key, value, when, lambda base: base)
            continue
        assert got == pytest.approx(right, rel=1e-5)


@both
@pytest.mark.parametrize("kind", ["float32", "float64", "0-d array", "Fraction"])
def test_betas_of_other_kinds(kind: str, fused: Any) -> None:
    def last(betas: Any) -> list[float]:
        p = nn.Parameter(torch.tensor([1.0, 2.0]))
        opt = optx.wrap(torch.optim.AdamW([p], lr=0.1, foreach=False), fused=fused)
        opt.param_groups[0]["betas"] = betas
        for g in (1.0, -3.0):
            p.grad = torch.full((2,), g)
            opt.step()
        return p.tolist()

    make = KINDS[kind]
    try:
        got = last((make(0.5), make(0.75)))
    except TypeError:
        assert not fused  # torch's own step does not take them
        return
    assert got == pytest.approx(last((0.5, 0.75)), rel=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", None),
        ("lr", "0.1"),
        ("lr", torch.ones(2)),
        ("weight_decay", np.ones(3)),
        ("eps", 1j),
        ("betas", (0.9, None)),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_at_the_step_that_would_use_it(key: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optx.wrap(torch.optim.AdamW([p]), optx.PerpGrad(), fused="cpu")
    p.grad = torch.ones(2)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0][key] = value
    with pytest.raises(optx.OptxError, match=f"a param group has {key}="):
        opt.step()
    assert torch.equal(p, before)
    assert float(opt.state[p]["step"]) == 1.0


@both
def test_hooks_on_the_base_run_before_anything_is_measured(fused: Any) -> None:
    def scale(opt: Any, *_: Any) -> None:
        for p in opt.param_groups[0]["params"]:
            p.grad = p.grad * 0.1

    def nothing(opt: Any, *_: Any) -> None:
        opt.param_groups[0]["lr"] = 0.0

    def none(opt: Any, *_: Any) -> None:
        opt.param_groups[0]["params"][0].grad = None

    for hook, wanted in ((scale, -0.1), (nothing, 0.0), (none, 0.0)):
        p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        base = torch.optim.SGD([p, q], lr=1.0)
        base.register_step_pre_hook(hook)
        opt = optx.wrap(base, fused=fused)
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        opt.step()
        assert p.tolist() == pytest.approx([wanted] * 4)


# ---- keys ----------------------------------------------------------------------


def grouped(**keys: Any) -> optx.Wrapped:
    p = nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([{"params": [p], **keys}], weight_decay=0)
    return optx.wrap(base, optx.PerpGrad(), optx.AdamR())


MISSPELT = {
    "perpgrad": "perp_grad",
    "perp-grad": "perp_grad",
    "PerpGrad": "perp_grad",
    "prep_grad": "perp_grad",
    "adam_r": "adamr",
    "AdamR": "adamr",
    "adamr_wieght": "adamr_weight",
    "adamr_weigth": "adamr_weight",
    "perp_grad_rescal": "perp_grad_rescale",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_told_the_near_name(key: str) -> None:
    with pytest.raises(optx.TransformError, match=f"{key!r}.*{MISSPELT[key]}"):
        grouped(**{key: False})
    opt = grouped()
    count = len(opt.param_groups)
    with pytest.raises(optx.TransformError, match=f"{key!r}.*{MISSPELT[key]}"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], key: False})
    assert len(opt.param_groups) == count
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones(3)
    opt.param_groups[0][key] = False  # later, by hand
    with pytest.raises(optx.TransformError, match=f"{key!r}.*{MISSPELT[key]}"):
        opt.step()
    assert torch.equal(p, torch.ones(3))


OTHERS = [
    "name",
    "layer",
    "lr_scale",
    "weight",
    "lr_mult",
    "tag",
    "group_name",
    "rescale",
    "layer_id",
    "is_bias",
]


@pytest.mark.parametrize(
    "key", [*OTHERS, "no_decay", "use_muon", "adapter", "initial_lr", "d", "scale", "min_lr"]
)
def test_keys_of_other_people_are_left_alone(key: str) -> None:
    opt = grouped(**{key: 0.5})
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones(3)
    opt.step()
    assert opt.param_groups[0][key] == 0.5


def test_known_keys_work_in_groups() -> None:
    opt = grouped(perp_grad=False, adamr_weight=0.25)
    assert "AdamR" in str(opt.plan())
    assert "PerpGrad" not in str(opt.plan())
    assert "0.25" in str(opt.plan())


# ---- ranges and what is shown ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adamr_weight", -0.1),
        ("adamr_weight", float("nan")),
        ("adamr_weight", "0.1"),
        ("adamr_weight", None),
        ("perp_grad_rescale", 2.0),
        ("perp_grad_rescale", -1),
        ("perp_grad_rescale", float("inf")),
    ],
    ids=str,
)
def test_overrides_out_of_range_are_refused_wherever_they_come_from(key: str, value: Any) -> None:
    with pytest.raises(optx.TransformError, match=key):
        grouped(**{key: value})
    opt = grouped()
    with pytest.raises(optx.TransformError, match=key):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], key: value})
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.arange(3.0)
    good = opt.param_groups[0][key]
    opt.param_groups[0][key] = value
    for _ in range(2):  # it is not forgotten
        with pytest.raises((optx.TransformError, optx.OptxError), match=key):
            opt.step()
    assert torch.equal(p, torch.ones(3))
    opt.param_groups[0][key] = good
    opt.step()
    assert not torch.equal(p, torch.ones(3))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(optx.TransformError, match=key):
        opt.load_state_dict(saved)
    assert opt.param_groups[0][key] == good


def test_plan_and_repr_show_the_numbers_in_force() -> None:
    opt = grouped()
    opt.adamr.weight = 0.125
    assert "AdamR(weight=0.125" in str(opt.plan())
    assert "weight=0.125" in repr(opt)
    opt.param_groups[0]["adamr_weight"] = 0.75
    assert "weight=0.75" in str(opt.plan())
    assert "weight=0.75" in repr(opt)


# ---- opt.adamr.weight = ... ----------------------------------------------------------------------


def pulled(fused: Any = "cpu") -> tuple[list[nn.Parameter], optx.Wrapped]:
    """Two groups, the second with its own weight."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])], "adamr_weight": 0.5}]
    base = torch.optim.SGD(groups, lr=1.0)
    anchors = {"a": torch.ones(4), "b": torch.ones(4)}
    return params, optx.wrap(base, optx.AdamR(0.1, normalize=False, anchor=anchors), fused=fused)


def step(params: list[nn.Parameter], opt: optx.Wrapped) -> list[float]:
    """Pulls from zero towards one by the weights in force."""
    for p in params:
        p.data.zero_()
        p.grad = torch.zeros_like(p)
    opt.step()
    return [float(p.detach()[0]) for p in params]


@both
def test_a_weight_is_set_by_a_schedule_and_overrides_stay(fused: Any) -> None:
    params, opt = pulled(fused)
    for weight in (0.1, 0.2, 0.05):
        opt.adamr.weight = weight
        assert step(params, opt) == pytest.approx([weight, 0.5])
        assert opt.param_groups[0]["adamr_weight"] == weight
    opt.adamr.weight = torch.tensor(0.25)
    assert step(params, opt) == pytest.approx([0.25, 0.5])


def test_a_weight_that_is_set_is_checked_and_nothing_changes() -> None:
    params, opt = pulled()
    for value in (-1.0, float("nan"), "0.2", None):
        with pytest.raises(optx.TransformError, match="AdamR: weight is"):
            opt.adamr.weight = value
    assert step(params, opt) == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_a_weight_that_was_set_goes_on_after(how: str) -> None:
    params, opt = pulled()
    opt.adamr.weight = 0.3
    step(params, opt)
    if how == "load":
        saved = copy.deepcopy(opt.state_dict())
        params, other = pulled()
        other.load_state_dict(saved)
    else:
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        params, other = copied((params, opt))
    assert step(params, other) == pytest.approx([0.3, 0.5])
    other.adamr.weight = 0.4
    assert step(params, other) == pytest.approx([0.4, 0.5])
    assert opt.param_groups[0]["adamr_weight"] == 0.3


def test_options_of_a_users_own_transform_are_set_alike() -> None:
    @optx.rule(writes="g")
    def scaled(g: Any, factor: Any) -> Any:
        return g * factor

    class Scaled(optx.Transform):
        name = "scaled"
        rules = {"gradient": scaled}  # noqa: RUF012

        def __init__(self, factor: float = 1.0) -> None:
            self.options = {"factor": factor}

    p = nn.Parameter(torch.zeros(2))
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), Scaled(2.0), fused=False)
    opt.scaled.factor = 3.0
    p.grad = torch.ones(2)
    opt.step()
    assert p.tolist() == [-3.0, -3.0]
    opt.add_param_group({"params": [q := nn.Parameter(torch.zeros(1))]})
    q.grad = torch.ones(1)
    opt.step()
    assert q.tolist() == [-3.0]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, -0.1, "0.1"])
def test_what_the_constructor_refuses_is_refused_everywhere(value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optx.wrap(torch.optim.AdamW([p], weight_decay=0), optx.AdamR(0.1), fused=False)
    with pytest.raises(optx.OptxError, match="weight is "):
        opt.adamr.weight = value
    opt.param_groups[0]["adamr_weight"] = value
    p.grad = torch.ones(2)
    with pytest.raises(optx.OptxError, match="adamr_weight="):
        opt.step()
    assert torch.equal(p, torch.ones(2))


def test_a_misspelt_option_of_a_schedule_is_an_error() -> None:
    opt = optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), optx.AdamR(0.1, normalize=False))
    with pytest.raises(optx.OptxError, match=r"'wieght' is no option of it\. Is 'weight' meant"):
        opt.adamr.wieght = 0.5
    assert opt.adamr.weight == 0.1


def test_a_word_does_not_switch_a_transform() -> None:
    group = {"params": [nn.Parameter(torch.ones(2))], "adamr": "no"}
    with pytest.raises(optx.OptxError, match="adamr='no'; it must be True or False"):
        optx.wrap(torch.optim.SGD([group], lr=0.1), optx.AdamR(0.1, normalize=False))


def test_a_setting_is_checked_though_a_refused_group_came_between() -> None:
    opt = grouped()
    opt.param_groups[0]["adamr_weight"] = -1.0
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    for act in (lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), opt.step):
        with pytest.raises(optx.TransformError, match=r"adamr_weight=-1\.0; it must be at least 0"):
            act()
    assert len(opt.param_groups) == 1
