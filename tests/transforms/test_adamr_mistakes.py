"""AdamR: mistakes that look like success are told once, and what is right is not talked about."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bases import make_net, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import optx
from optx import AdamR

# pyproject.toml lets one of these warnings pass in the other test files.
# Later marks come first. Many steps here are taken without a gradient, which is told as well.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:optx. step.. found no gradient"),
]


def adam(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), **{"lr": 0.01, "weight_decay": 0.0, **options})


def wrap(net: nn.Module, transform: AdamR | None = None, **options: Any) -> optx.Wrapped:
    return optx.wrap(adam(net, **options), transform or AdamR(), fused=False)


# ---- two pulls --------------------------------------------------------------------------------------

BOTH = r"AdamR: param group {} has weight_decay={} in the base, so both pulls act"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("decay", [0.1, np.float64(0.1), torch.tensor(0.1)], ids=["float", "numpy", "tensor"])
def test_weight_decay_is_told_at_wrap(make: Any, decay: Any) -> None:
    net = make_net()
    base = make(net.parameters(), weight_decay=0.1)
    base.param_groups[0]["weight_decay"] = decay
    with pytest.warns(UserWarning, match=BOTH.format(0, "0.1")) as caught:
        opt = optx.wrap(base, AdamR(), fused=False)
    assert [w.filename for w in caught] == [__file__]
    base.param_groups[0]["weight_decay"] = 0.1
    train(net, opt, range(2))  # once


@pytest.mark.parametrize("how", ["set", "group", "scheduler"])
def test_weight_decay_is_told_when_it_comes_later(how: str) -> None:
    net = make_net()
    opt = optx.wrap(adam(net.first), AdamR(), fused=False)
    train(net, opt, range(1))
    if how == "group":
        opt.add_param_group({"params": list(net.second.parameters()), "weight_decay": 0.2})
    else:
        opt.param_groups[0]["weight_decay"] = 0.2
    if how == "scheduler":  # which wraps the step
        torch.optim.lr_scheduler.ConstantLR(opt)
    with pytest.warns(UserWarning, match=BOTH.format(int(how == "group"), "0.2")) as caught:
        opt.step()
    assert [w.filename for w in caught if "AdamR" in str(w.message)] == [__file__]
    train(net, opt, range(2))


def test_a_schedule_that_turns_the_pull_on_is_told() -> None:
    net = make_net()
    opt = wrap(net, AdamR(0.0), weight_decay=0.1)
    train(net, opt, range(1))
    opt.param_groups[0]["adamr_weight"] = 0.1
    with pytest.warns(UserWarning, match=BOTH.format(0, "0.1")):
        opt.step()


def test_weight_decay_where_nothing_pulls_is_not_told() -> None:
    net = make_net()
    groups = [
        {"params": net.first.parameters(), "weight_decay": 0.1, "adamr": False},
        {"params": net.second.parameters(), "weight_decay": 0.1, "adamr_weight": 0.0},
        {"params": net.norm.parameters(), "weight_decay": 0.0},
    ]
    opt = optx.wrap(torch.optim.AdamW(groups, lr=0.01), AdamR(), fused=False)
    train(net, opt, range(2))


# ---- wrapped before the pretrained weights ----------------------------------------------------------

CHANGED = r"AdamR: ['\"]{}['\"] changed between optx.wrap and the first step"
FIRST = r"param_groups\[0\]\['params'\]\[1\]"  # the first, scale, is 1.5 in all


def assign(net: nn.Module, other: nn.Module, how: str) -> None:
    pairs = list(zip(net.parameters(), other.parameters(), strict=True))
    if how == "load_state_dict":
        net.load_state_dict(other.state_dict())
        return
    for p, q in pairs if how != "one bias" else pairs[-2:-1]:
        if how == "copy_":
            with torch.no_grad():
                p.copy_(q)
        elif how == "data.copy_":  # no version counter tells of it
            p.data.copy_(q.data)
        elif how == "data =":
            p.data = q.detach().clone()
        elif how == "one bias":
            p.data.add_(1.0)
        else:
            p.detach().numpy()[...] = q.detach().numpy()


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data.copy_", "data =", "one bias", "numpy"])
@pytest.mark.parametrize("anchor", ["none", "model", "state_dict"])
def test_weights_loaded_after_wrap_are_told_once(how: str, anchor: str) -> None:
    net = make_net()
    source: Any = {"none": None, "model": net, "state_dict": net.state_dict()}[anchor]
    opt = optx.wrap(
        adam(net) if anchor == "none" else torch.optim.AdamW(net.named_parameters(), 0.01, weight_decay=0.0),
        AdamR(anchor=source),
        fused=False,
    )
    assign(net, make_net(1), how)
    name = FIRST if anchor == "none" else "first.weight"
    with pytest.warns(UserWarning, match=CHANGED.format(".*" if how == "one bias" else name)) as caught:
        opt.step()
    assert [w.filename for w in caught if "AdamR" in str(w.message)] == [__file__]
    train(net, opt, range(2))


def test_one_that_is_told_is_named_by_the_model() -> None:
    net = make_net()
    opt = wrap(net, AdamR(model=net))
    with torch.no_grad():
        net.second.weight.add_(1.0)
    with pytest.warns(
        UserWarning, match=CHANGED.format("second.weight") + ".*before optx.wrap, or pass .*anchor="
    ):
        opt.step()


QUIET: dict[str, Callable[[nn.Module, optx.Wrapped], Any]] = {
    "nothing": lambda net, opt: None,
    "the same numbers": lambda net, opt: net.load_state_dict(make_net().state_dict()),
    "a cast": lambda net, opt: net.to(torch.bfloat16),
    "a new storage": lambda net, opt: assign(net, make_net(), "data ="),
    "no gradient yet": lambda net, opt: opt.step() or train(net, opt, range(1)),
    "later": lambda net, opt: train(net, opt, range(1)) or net.load_state_dict(make_net(1).state_dict()),
    "nan": lambda net, opt: None,
}


@pytest.mark.parametrize("what", QUIET)
def test_weights_that_have_not_changed_are_not_talked_about(what: str) -> None:
    net = make_net()
    if what == "nan":
        net.first.weight.data[0, 0] = math.nan
    opt = wrap(net, AdamR(normalize=False))
    QUIET[what](net, opt)
    opt.step()


@pytest.mark.parametrize("first", ["weights", "optimizer"])
@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "fresh"])
def test_a_resumed_run_is_not_talked_about(first: str, stepped: bool) -> None:
    """The anchors come from the checkpoint, or from where the weights were at wrap; loading tells what."""
    net = make_net()
    opt = wrap(net)
    train(net, opt, range(2 if stepped else 0))
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    again = make_net(1)
    resumed = wrap(again)
    for what in (first, "optimizer" if first == "weights" else "weights"):
        again.load_state_dict(saved[0]) if what == "weights" else resumed.load_state_dict(saved[1])
    train(again, resumed, range(1))


def test_a_base_that_is_loaded_by_its_old_name_is_not_talked_about() -> None:
    net = make_net()
    opt = wrap(net)
    train(net, opt, range(2))
    again = make_net(1)
    resumed = wrap(again)
    again.load_state_dict(net.state_dict())
    resumed.base.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(again, resumed, range(1))


def test_rehearsals_and_warm_ups_do_not_count_as_the_first_step() -> None:
    """torch's distributed checkpoint steps with lr 0; so does a schedule that begins there."""
    net = make_net()
    opt = wrap(net)
    get_optimizer_state_dict(net, opt)
    opt.param_groups[0]["lr"] = torch.tensor(0.0)
    train(net, opt, range(1))
    net.load_state_dict(make_net(1).state_dict())
    opt.param_groups[0]["lr"] = 0.01
    with pytest.warns(UserWarning, match=CHANGED.format(FIRST)):
        opt.step()


def test_weights_loaded_into_parameters_that_were_replaced_are_told() -> None:
    """Accelerate and FSDP2 put other objects into the groups."""
    net, other = make_net(), make_net(1)
    opt = wrap(net)
    opt.param_groups[0]["params"][:] = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    opt.step()
    opt = wrap(net)
    opt.param_groups[0]["params"][:] = list(other.parameters())
    with pytest.warns(UserWarning, match=CHANGED.format(FIRST)):
        opt.step()


def test_weights_that_are_not_pulled_are_not_talked_about() -> None:
    net = make_net()
    groups = [
        {"params": net.first.parameters(), "adamr_weight": 0.0},
        {"params": net.second.parameters(), "adamr": False},
        {"params": net.norm.parameters()},
    ]
    opt = optx.wrap(torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0), AdamR(), fused=False)
    for layer in (net.first, net.second):
        layer.load_state_dict({n: t + 1.0 for n, t in layer.state_dict().items()})
    train(net, opt, range(2))


def test_other_weights_than_the_anchors_are_what_a_file_is_for() -> None:
    net = make_net()
    base = torch.optim.AdamW(net.named_parameters(), lr=0.01, weight_decay=0.0)
    opt = optx.wrap(base, AdamR(anchor=make_net(1)), fused=False)
    net.load_state_dict(make_net(2).state_dict())
    train(net, opt, range(2))


def test_a_copy_before_the_first_step_looks_too() -> None:
    net, opt = copy.deepcopy((net := make_net(), wrap(net)))
    net.load_state_dict(make_net(1).state_dict())
    with pytest.warns(UserWarning, match=CHANGED.format(FIRST)):
        opt.step()


# ---- the pull overshoots ----------------------------------------------------------------------------

NUMBERS = {
    "float": float,
    "tensor": torch.tensor,
    "numpy": np.float64,
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_overshoot_names_the_numbers_in_force(kind: str, norm: Any) -> None:
    p = nn.Parameter(torch.ones(4))
    base = torch.optim.AdamW([p], lr=0.01, weight_decay=0.0)
    opt = optx.wrap(base, AdamR(1.0, norm, normalize=False), fused=False)
    p.grad = torch.zeros(4)
    opt.step()
    opt.param_groups[0].update(lr=NUMBERS[kind](0.5), adamr_weight=3.0)
    words = r"lr \* weight / r is 1.5 in param group 0 \(lr 0.5, weight 3, r 1\)"
    words += ", so each step overshoots" if norm == "l2" else ", so each step moves each weight by 1.5"
    with pytest.warns(UserWarning, match=words) as caught:
        opt.step()
    assert [w.filename for w in caught if "AdamR" in str(w.message)] == [__file__]
    opt.step()


def test_overshoot_of_a_group_that_is_left_out_is_none() -> None:
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [a], "lr": 100.0, "adamr": False}, {"params": [b], "lr": 0.1}]
    opt = optx.wrap(torch.optim.SGD(groups, lr=0.1), AdamR(1.0, normalize=False), fused=False)
    a.grad = b.grad = torch.zeros(4)
    opt.step()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_overshoot_is_not_read_from_an_earlier_step(fused: bool) -> None:
    """No gradient in this step, so no r; the last one's is of another lr's time."""
    p = nn.Parameter(torch.ones(4))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.01, weight_decay=0.0), AdamR(1.0), fused=fused)
    p.grad = torch.full((4,), 0.5)
    opt.step()
    p.grad = None
    opt.param_groups[0]["lr"] = 100.0
    opt.step()
    p.grad = torch.full((4,), 0.5)
    with pytest.warns(UserWarning, match=r"\(lr 100, weight 1, r 0.5\)"):
        opt.step()


# ---- the sum of the second moment -------------------------------------------------------------------

BASES = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "amsgrad": lambda p, **k: torch.optim.AdamW(p, amsgrad=True, weight_decay=0.0, **k),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_of_a_base_that_has_stepped(kind: str, dtype: torch.dtype) -> None:
    """In float64: 1 and 10^4 times 1e-5, which sums in the moments' own dtype lose."""
    p = nn.Parameter(torch.ones(10_001, dtype=dtype))
    options = {"weight_decay": 0.0} if kind != "amsgrad" else {}
    base = BASES[kind]([p], lr=0.0, **options)
    p.grad = torch.full_like(p, 0.1)
    base.step()
    v = base.state[p]["exp_avg_sq"]
    v.fill_(1e-5)
    v[0] = 1.0
    opt = optx.wrap(base, AdamR(), fused=False)
    total = opt.slot(p, opt.adamr, "v_sum")
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(math.fsum(v.double().tolist()), rel=1e-13)


def test_the_sum_of_a_base_that_has_not() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([a, b], weight_decay=0.0)
    a.grad = torch.ones(3)
    base.step()
    opt = optx.wrap(base, AdamR(), fused=False)
    assert float(opt.slot(a, opt.adamr, "v_sum")) == pytest.approx(0.003, rel=1e-6)
    assert float(opt.slot(b, opt.adamr, "v_sum")) == 0.0


# ---- arguments --------------------------------------------------------------------------------------

WEIGHTS = {
    "numpy": np.float32(0.5),
    "0-d array": np.array(0.5),
    "int": 2,
    "fraction": Fraction(1, 2),
    "tensor": torch.tensor(0.5),
    "trained": nn.Parameter(torch.tensor(0.5)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_weights_are_any_numbers(kind: str, fused: bool) -> None:
    p = nn.Parameter(torch.ones(4))
    transform = AdamR(WEIGHTS[kind], anchor="zero", normalize=False)
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), transform, fused=fused)
    p.grad = torch.zeros(4)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 1.0 - 0.1 * (2.0 if kind == "int" else 0.5)))


NO_WEIGHTS: list[Any] = [
    True, np.True_, math.nan, math.inf, -math.inf, -0.1, "0.1", None, 1j, Decimal("0.1"), [0.1], np.ones(2),
    np.float32("nan"), torch.tensor(math.nan), torch.tensor(True), torch.ones(2), torch.tensor(-1.0),
]  # fmt: skip


@pytest.mark.parametrize("weight", NO_WEIGHTS, ids=repr)
def test_what_is_no_weight(weight: Any) -> None:
    with pytest.raises(optx.OptxError, match=r"AdamR: weight is .*; it must be at least 0"):
        AdamR(weight)


NO_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a generator": (
        {"anchor": make_net().named_parameters()},
        "anchor is a generator; it must be None, 'zero'",
    ),
    "pairs": ({"anchor": list(make_net().named_parameters())}, r"Pass dict\(model.named_parameters\(\)\)"),
    "parameters": ({"anchor": list(make_net().parameters())}, "a list of something else than paths"),
    "an empty list": ({"anchor": []}, "a list of something else than paths"),
    "a tensor": ({"anchor": torch.ones(3)}, "anchor is a Tensor"),
    "a number": ({"anchor": 0.0}, "anchor is a float"),
    "a state dict for a model": ({"model": {}}, "model is a dict; it must be the model that is trained"),
    "normalize": ({"normalize": "yes"}, "normalize is 'yes'; it must be True or False"),
    "save_anchor": ({"save_anchor": 0, "anchor": make_net()}, "save_anchor is 0; it must be True or False"),
}


@pytest.mark.parametrize("kind", NO_ARGUMENTS)
def test_what_is_no_argument(kind: str) -> None:
    arguments, words = NO_ARGUMENTS[kind]
    with warnings.catch_warnings(), pytest.raises(optx.OptxError, match=f"AdamR: .*{words}"):
        AdamR(**arguments)
