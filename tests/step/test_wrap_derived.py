"""Numbers taken from the base's state (AdamR's running sum) are right whatever happened to it meanwhile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", ["cpu", False], ids=["fused", "foreach"])
N = 50
SUM = "optx.adamr.v_sum"


def made(
    fused: Any, kind: Any = torch.optim.AdamW, **options: Any
) -> tuple[list[nn.Parameter], optx.Wrapped]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(7))]
    base = kind(params, lr=0.01, weight_decay=0, **options)
    return params, optx.wrap(base, optx.AdamR(0.05), fused=fused)


def grads(params: list[nn.Parameter], t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * (0.1 if t < 3 else 1.0)


def check(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    """The r of a step is the root of the mean of the second moment, corrected, over all weights."""
    r = (float(opt.totals["adamr.second"]) / float(opt.totals["numel"])) ** 0.5
    name = "max_exp_avg_sq" if opt.param_groups[0]["amsgrad"] else "exp_avg_sq"
    hats = [opt.state[p][name] / (1 - 0.999 ** float(opt.state[p]["step"])) for p in params]
    assert r == pytest.approx(float(torch.cat(hats).double().mean()) ** 0.5, rel=1e-5)


Edit = Callable[[list[nn.Parameter], optx.Wrapped], None]


def steps(params: list[nn.Parameter], opt: torch.optim.Optimizer, numbers: Any) -> None:
    for t in numbers:
        grads(params, t)
        opt.step()


def between(change: Callable[[dict[str, Any]], None], back: Callable[[dict[str, Any]], None]) -> Edit:
    """Three steps with another group setting."""

    def edit(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
        change(opt.param_groups[0])
        steps(params, opt, range(10, 13))
        back(opt.param_groups[0])

    return edit


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda group: group.__setitem__(key, value)


def in_place(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.state[params[0]]["exp_avg_sq"].mul_(100.0)


def through_data(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.state[params[0]]["exp_avg_sq"] = opt.state[params[0]]["exp_avg_sq"].data * 100.0


def through_data_twice(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    """Every such tensor has been written once in its life."""
    state = opt.state[params[0]]
    for factor in (3.0, 100.0):
        steps(params, opt, range(80, 82))
        state["exp_avg_sq"] = state["exp_avg_sq"].data.mul_(factor)


def one_replaced(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.state[params[1]]["exp_avg_sq"] = torch.full((7,), 9.0)


def one_deleted(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    del opt.state[params[0]]


def cleared(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.state.clear()


def entry_cleared(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.state[params[0]].clear()


def sum_spoilt(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    """By a person: the moment it goes with is replaced by its copy."""
    opt.state[params[0]][SUM].fill_(1e6)
    opt.state[params[0]]["exp_avg_sq"] = opt.state[params[0]]["exp_avg_sq"].clone()


def plain_torch(params: list[nn.Parameter], opt: optx.Wrapped, **options: Any) -> None:
    """Saved, gone on without optx, saved, loaded again."""
    base = type(opt.base)(params, lr=0.01, weight_decay=0, **options)
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    base.param_groups[0].update(options)
    steps(params, base, range(20, 25))
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    opt.param_groups[0].update(dict.fromkeys(options))


def torchs_fused(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    plain_torch(params, opt, fused=True)


def late_gradients(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    for t in range(30, 33):
        grads(params, t)
        params[1].grad = None
        opt.step()


def older(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    saved = copy.deepcopy(opt.state_dict())
    steps(params, opt, range(40, 44))
    opt.load_state_dict(saved)


def foreign(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    """A checkpoint of a run with other gradients, whose sum says something else."""
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["exp_avg_sq"] = entry["exp_avg_sq"] * 25.0
    opt.load_state_dict(saved)


def skipped(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    opt.skip_nonfinite = True
    grads(params, 50)
    assert params[0].grad is not None
    params[0].grad[0] = float("nan")
    opt.step()
    assert opt.skipped_last


def other_path(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    was, opt.fused = opt.fused, (False if opt.fused == "cpu" else "cpu")
    steps(params, opt, range(60, 63))
    opt.fused = was


def halved_beta(params: list[nn.Parameter], opt: optx.Wrapped) -> None:
    steps(params, opt, range(70, 71))
    opt.state[params[0]]["exp_avg_sq"].zero_()
    opt.state[params[0]]["exp_avg_sq"].add_(0.5)


EDITS: dict[str, Edit] = {
    "off and on": between(set_key("adamr", False), set_key("adamr", True)),
    "weight 0": between(set_key("adamr_weight", 0.0), set_key("adamr_weight", 0.05)),
    "decay comes and goes": between(set_key("weight_decay", 0.1), set_key("weight_decay", 0)),
    "amsgrad off again": between(set_key("amsgrad", True), set_key("amsgrad", False)),
    "amsgrad stays": lambda _, opt: opt.param_groups[0].update(amsgrad=True),
    **{
        f.__name__: f
        for f in (
            in_place,
            through_data,
            through_data_twice,
            one_replaced,
            one_deleted,
            cleared,
            entry_cleared,
            sum_spoilt,
            plain_torch,
            torchs_fused,
            late_gradients,
            older,
            foreign,
            skipped,
            other_path,
            halved_beta,
        )
    },
}


@pytest.mark.long(keep=3)
@both
@pytest.mark.filterwarnings("ignore:.*both pulls act", "ignore:.*the checkpoint has no")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam], ids=lambda k: k.__name__)
@pytest.mark.parametrize("edit", EDITS)
def test_r_is_right_after(edit: str, kind: Any, fused: Any) -> None:
    params, opt = made(fused, kind)
    steps(params, opt, range(5))
    check(params, opt)
    anchors = [opt.slot(p, opt.adamr, "anchor").clone() for p in params]
    if not fused and "amsgrad" in edit:
        with pytest.raises(optx.TransformError, match="max_exp_avg_sq"):  # made at the start only
            between(set_key("amsgrad", True), lambda _: None)(params, opt)
        opt.param_groups[0]["amsgrad"] = False
        steps(params, opt, [7])
        check(params, opt)
        return
    EDITS[edit](params, opt)
    for t in (7, 8):
        steps(params, opt, [t])
        check(params, opt)
    if edit not in ("one_deleted",):
        assert all(
            torch.equal(opt.slot(p, opt.adamr, "anchor"), a) for p, a in zip(params, anchors, strict=True)
        )


@both
@pytest.mark.parametrize("how", ["all", "one", "its entry"])
def test_cleared_state_resets_moments_and_keeps_anchors(how: str, fused: Any) -> None:
    params, opt = made(fused)
    start = [p.detach().clone() for p in params]
    steps(params, opt, range(4))
    if how == "all":
        opt.state.clear()
    elif how == "one":
        del opt.state[params[0]]
    else:
        opt.state[params[0]].clear()
    steps(params, opt, [5])
    assert float(opt.state[params[0]]["step"]) == 1.0
    for p, w in zip(params, start, strict=True):
        assert torch.equal(opt.slot(p, opt.adamr, "anchor"), w)


def run_on(source: Any, fused: Any) -> list[Tensor]:
    params, opt = source
    steps(params, opt, range(5, 9))
    return [*(p.detach() for p in params), *(opt.state[p][SUM] for p in params)]


@both
@pytest.mark.parametrize("how", ["load", "file", "deepcopy"])
def test_a_resumed_run_is_bit_identical(how: str, fused: Any) -> None:
    """The sum is looked at anew, and the bits that were kept stay."""
    params, opt = made(fused)
    steps(params, opt, range(5))
    if how == "deepcopy":
        other: Any = copy.deepcopy((params, opt))
    else:
        saved = copy.deepcopy(opt.state_dict())
        if how == "file":
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        fresh, resumed = made(fused)
        resumed.load_state_dict(saved)
        with torch.no_grad():
            for q, p in zip(fresh, params, strict=True):
                q.copy_(p)
        other = fresh, resumed
    for a, b in zip(run_on(other, fused), run_on((params, opt), fused), strict=True):
        assert torch.equal(a, b)


def test_to_look_costs_no_pass() -> None:
    """An undisturbed run takes the sum from memory once, in the first step, and never again."""
    params, opt = made("cpu")
    taken: list[str] = []
    own = opt.adamr.init_slot
    object.__setattr__(opt.adamr, "init_slot", lambda name, p, o: taken.append(name) or own(name, p, o))
    steps(params, opt, range(1))
    taken.clear()
    steps(params, opt, range(1, 6))
    assert taken == []
    in_place(params, opt)
    steps(params, opt, [6])
    assert taken == ["v_sum"]
