"""`Wrapped.metrics`: numbers of a step for a log, against computations of their own in float64."""

from __future__ import annotations

import copy
import inspect
import math
import re

import pytest
import torch
from torch import nn

import optx
from optx._generalised_gaussian import fit_shape, pooled_sums
from tests.hft_models import Residual

pytestmark = pytest.mark.filterwarnings("ignore:MuAdamW")  # no MuReadout in so small a model
ADAMW = {"lr": 0.01, "weight_decay": 0.0}


def transforms():
    """The public transforms by name, as optx exports them."""
    found = {n: c for n, c in vars(optx).items() if inspect.isclass(c) and issubclass(c, optx.Transform)}
    return {name: kind for name, kind in found.items() if kind is not optx.Transform}


def documented(method, marks=r"``([^`]+)``"):
    """The names in the table of a method's docstring."""
    rows = [line[:44] for line in method.__doc__.splitlines() if "/" in line[:44]]
    return {name for row in rows for name in re.findall(marks, row)}


def masked(model):
    masks = optx.Masks.from_bool({"enter.weight": torch.arange(32).view(8, 4) % 3 > 0})
    masks.apply_(model)
    return masks


MAKE = {
    "BackSlash": lambda model: optx.BackSlash(1e-3, exact=False),
    "SubGM": lambda model: optx.SubGM(0.1, 0.9),
    "Clip": lambda model: optx.Clip(0.125),
    "NormalizedGrad": lambda model: optx.NormalizedGrad("global"),
    "PerpGrad": lambda model: optx.PerpGrad(),
    "AdamR": lambda model: optx.AdamR(weight=0.5),
    "HFT": lambda model: optx.HFT(model, blocks=r"blocks\.\d+"),
    "KeepMask": lambda model: optx.KeepMask(masked(model), model),
    "SaRA": lambda model: optx.SaRA(threshold=0.1),
    "DSPReg": lambda model: optx.DSPReg(domains=2),
    "MuAdamW": lambda model: optx.MuAdamW(optx.scaling.shapes(model, base=Residual(width=4)), model=model),
}


def of_clip(run):
    norm = math.sqrt(sum(float(g.square().sum()) for g in run.grads))
    assert norm > 0.125
    return {"clip/norm": norm, "clip/scale": 0.125 / (norm + 1e-6)}


def of_normalized_grad(run):
    norm = math.sqrt(sum(float(g.square().sum()) for g in run.grads))
    return {"normalized_grad/frozen": 0.0, "normalized_grad/norm": norm}


def of_perp_grad(run):
    removed = given = 0.0
    for w, g in zip(run.before, run.grads, strict=True):
        given += float(g.square().sum())
        removed += float((w * g).sum() ** 2 / w.square().sum()) if w.numel() > 1 else 0.0
    return {"perp_grad/removed": math.sqrt(removed / given)}


def of_adamr(run):
    served = [p for p in run.params if p.grad is not None]
    seconds = [run.opt.state[p]["exp_avg_sq"].double() / (1 - 0.999**run.steps) for p in served]
    scale = math.sqrt(sum(float(v.sum()) for v in seconds) / sum(v.numel() for v in seconds))
    moved = zip(run.params, run.start, strict=True)
    distance = math.sqrt(sum(float((p.detach().double() - a).square().sum()) for p, a in moved))
    return {"adamr/distance": distance, "adamr/pull": 0.01 * 0.5 / scale, "adamr/scale": scale}


def of_hft(run):
    trained = sum(p.numel() for p in run.params if p.requires_grad)
    return {"hft/active": trained / sum(p.numel() for p in run.params), "hft/round": 0.0}


def of_keep_mask(run):
    return {"keep_mask/kept": float((torch.arange(32) % 3 > 0).double().mean())}


def of_sara(run):
    small = sum(int((w.abs() < 0.1).sum()) for w in run.start)
    return {"sara/trained": small / sum(w.numel() for w in run.start), "sara/threshold": 0.1}


def of_dsp_reg(run):
    kept = [run.opt.state[p]["optx.dsp_reg.sensitivity"].double() for p in run.params if p.ndim > 1]
    mean = sum(float(s.sum()) for s in kept) / sum(s.numel() for s in kept)
    return {"dsp_reg/sensitivity": mean, "dsp_reg/strength": 1.0}


def of_mu(run):
    rates = [group["lr"] for group in run.opt.param_groups]
    return {"mu/lr_min": min(rates), "mu/lr_max": max(rates)}


def of_backslash(run):
    shape = fit_shape(*pooled_sums(run.before))
    return {
        "backslash/shape": shape,
        "backslash/rate": 1e-3 * shape / sum(w.numel() for w in run.before),
    }


def of_subgm(run):
    return {"subgm/step_size": 0.1 * 0.9 ** (run.steps - 1)}


EXPECTED = {
    **{"BackSlash": of_backslash, "SubGM": of_subgm},
    **{"Clip": of_clip, "PerpGrad": of_perp_grad, "AdamR": of_adamr, "HFT": of_hft, "KeepMask": of_keep_mask},
    **{"SaRA": of_sara, "DSPReg": of_dsp_reg, "MuAdamW": of_mu, "NormalizedGrad": of_normalized_grad},
}


class Run:
    """A few steps of a small model with one transform, with what the last one began from."""

    def __init__(self, names, steps=3, base=torch.optim.AdamW, **settings):
        torch.manual_seed(0)
        self.model = Residual()
        made = [MAKE[name](self.model) for name in names]
        self.params = list(self.model.parameters())
        self.start = [p.detach().double() for p in self.params]
        self.opt = optx.wrap(base(self.model.parameters(), **ADAMW), *made, **settings)
        self.steps = 0
        self.early = self.opt.metrics()
        for _ in range(steps):
            self.step()

    def backward(self):
        self.opt.zero_grad()
        if hasattr(self.opt, "dsp_reg"):
            for domain in range(2):
                with self.opt.dsp_reg.domain(domain):
                    self.model(torch.randn(5, 4)).square().mean().backward()
        else:
            self.model(torch.randn(5, 4)).square().mean().backward()
        nn.utils.clip_grad_norm_(self.params, 0.5)

    def step(self):
        self.backward()
        taken = [p for p in self.params if p.grad is not None]
        self.grads = [p.grad.double() for p in taken]
        self.before = [p.detach().double() for p in taken]
        self.opt.step()
        self.steps += 1

    def norm(self):
        return math.sqrt(sum(float(g.square().sum()) for g in self.grads))


def close(found, wanted):
    assert {name: pytest.approx(value, rel=1e-6) for name, value in wanted.items()} == {
        name: found[name] for name in wanted
    }


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("name", sorted(transforms()))
def test_every_transform_tells_what_its_names_say(name, fused):
    run = Run([name], fused=fused)
    found = run.opt.metrics()
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    close(found, {"optx/grad_norm": run.norm(), "optx/skipped_steps": 0.0, **EXPECTED[name](run)})
    rates = [n for n in found if n.startswith("optx/lr")]
    assert set(found) == {"optx/grad_norm", "optx/skipped_steps", *rates, *EXPECTED[name](run)}
    now = {"hft/active", "hft/round", "mu/lr_min", "mu/lr_max", "optx/skipped_steps", *rates}
    assert set(run.early) == set(found) & now  # nothing else is known before a step


def test_the_table_of_names_is_whole():
    names = {name for kind in transforms() for name in Run([kind], fused=False).opt.metrics()}
    named = {re.sub(r"lr/\d+", "lr/<i>", name) for name in names}
    assert named == documented(optx.Wrapped.metrics)


MIXED = {
    "clipped": (["PerpGrad", "AdamR", "HFT"], {}),
    "two sums": (["KeepMask", "PerpGrad", "AdamR"], {"skip_nonfinite": True}),
    "by torch": (["PerpGrad", "AdamR", "HFT"], {"base": torch.optim.NAdam}),
}


@pytest.mark.long(keep=7)
@pytest.mark.parametrize(("kinds", "settings"), MIXED.values(), ids=MIXED)
def test_the_first_call_changes_no_bit_and_knows_what_the_last_step_was(kinds, settings):
    quiet, asked = Run(kinds, 0, **settings), Run(kinds, 0, **settings)
    quiet.opt.metering = asked.opt.metering = False  # as before the call in Run
    for at in range(4):
        for run in (quiet, asked):
            torch.manual_seed(at)
            run.step()
        if at == 1:
            assert asked.opt.metering is False
            close(asked.opt.metrics(), {"optx/grad_norm": asked.norm()})
            if "KeepMask" not in kinds:  # behind which PerpGrad sees another gradient
                close(asked.opt.metrics(), of_perp_grad(asked))
            if settings.get("base") is None:
                close(asked.opt.metrics(), of_adamr(asked))
    assert asked.opt.metering
    assert not quiet.opt.metering
    for a, b in zip(quiet.params, asked.params, strict=True):
        assert torch.equal(a, b)
    states = [run.opt.state_dict()["state"] for run in (quiet, asked)]
    for mine, other in zip(states[0].values(), states[1].values(), strict=True):
        assert list(mine) == list(other)
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_gradients_that_are_gone_or_others_are_not_told():
    run = Run(["AdamR"], 0)
    run.opt.metering = False
    run.step()
    run.backward()
    assert "optx/grad_norm" not in run.opt.metrics()
    run.step()
    close(run.opt.metrics(), {"optx/grad_norm": run.norm()})


def test_a_step_that_meters_waits_for_no_device():
    run = Run(["PerpGrad", "AdamR", "HFT"])
    assert run.opt.metering
    assert run.opt.measured._read is None  # numbers come from there when they are asked for
    assert run.opt.metrics()
    assert run.opt.measured._read is not None


def test_a_skipped_step_is_counted_and_leaves_the_numbers_of_the_one_before():
    run = Run(["PerpGrad", "AdamR"], skip_nonfinite=True)
    before = run.opt.metrics()
    run.backward()
    run.params[0].grad[0, 0] = torch.inf
    run.opt.step()
    assert run.opt.metrics() == {**before, "optx/skipped_steps": 1.0}


def test_a_load_a_copy_and_removal():
    run = Run(["PerpGrad", "AdamR"])
    model, opt = copy.deepcopy((run.model, run.opt))
    assert "optx/grad_norm" not in opt.metrics()
    opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    assert "adamr/distance" not in opt.metrics()
    for mine, other in zip(model.parameters(), run.params, strict=True):
        mine.grad = None if other.grad is None else other.grad.clone()
    opt.step()
    run.opt.step()
    assert set(opt.metrics()) == set(run.opt.metrics())
    close(opt.metrics(), run.opt.metrics())
    opt.remove()
    with pytest.raises(optx.OptxError, match=r"metrics\(\) after remove"):
        opt.metrics()


def test_groups_of_their_own_later_groups_and_groups_that_are_left_out():
    params = [nn.Parameter(torch.full((3, n), 2.0)) for n in (1, 2, 3, 4)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5, "adamr_weight": 0.2}]
    groups.append({"params": params[2:3], "adamr": False, "perp_grad": False})
    opt = optx.wrap(torch.optim.AdamW(groups, **ADAMW), optx.PerpGrad(), optx.AdamR(weight=0.1))
    opt.add_param_group({"params": params[3:], "lr": 0.01})
    assert {n for n in opt.metrics() if "lr" in n} == {"optx/lr", *(f"optx/lr/{i}" for i in range(4))}
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    found = opt.metrics()
    served = [params[0], params[1], params[3]]
    distance = math.sqrt(sum(float((p.detach().double() - 2).square().sum()) for p in served))
    r = found["adamr/scale"]
    pull = (0.01 * 0.1 + 0.5 * 0.2 + 0.01 * 0.1) / 3 / r
    norm = math.sqrt(sum(p.numel() for p in params))
    close(found, {"optx/grad_norm": norm, "adamr/distance": distance, "adamr/pull": pull})
    close(found, {"perp_grad/removed": 1.0, "adamr/scale": 1.0})


def test_closures_that_are_evaluated_often_and_a_base_of_another_kind():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3))
    opt = optx.wrap(torch.optim.LBFGS([w], lr=0.1, max_iter=3), optx.PerpGrad())
    opt.metrics()
    seen = []

    def closure():
        opt.zero_grad()
        loss = (w - 1).pow(4).sum()
        loss.backward()
        seen.append(float(w.grad.double().norm()))
        return loss

    opt.step(closure)
    assert len(seen) > 1
    close(opt.metrics(), {"optx/grad_norm": seen[-1]})


def test_a_scaler_hands_over_gradients_without_its_scale():
    run = Run(["PerpGrad"], 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.opt.zero_grad()
    torch.manual_seed(5)
    scaler.scale(run.model(torch.randn(5, 4)).square().mean()).backward()
    norm = math.sqrt(sum(float((p.grad.double() / 1024).square().sum()) for p in run.params))
    scaler.step(run.opt)
    close(run.opt.metrics(), {"optx/grad_norm": norm})


def test_a_frozen_half_counts_in_the_distance_and_a_new_round_in_the_share():
    run = Run(["AdamR", "HFT"], 2)
    run.opt.hft.next_round()
    run.step()
    close(run.opt.metrics(), {"adamr/distance": of_adamr(run)["adamr/distance"], "hft/round": 1.0})


def test_lr_may_be_a_tensor_and_is_each_groups_where_they_differ():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 0.25), strict=True)]
    opt = optx.wrap(torch.optim.SGD(groups), optx.PerpGrad())
    rates = {"optx/lr": 0.375, "optx/lr/0": 0.5, "optx/lr/1": 0.25}
    assert opt.metrics() == {**rates, "optx/skipped_steps": 0.0}
    opt.param_groups[0]["lr"] = torch.tensor(0.25)
    assert opt.metrics() == {"optx/lr": 0.25, "optx/skipped_steps": 0.0}


def test_lr_is_what_the_step_took_however_a_scheduler_moves_it_on():
    for lr in (0.5, torch.tensor(0.5)):
        w = nn.Parameter(torch.ones(2))
        opt = optx.wrap(torch.optim.SGD([w], lr=lr), optx.PerpGrad())
        assert opt.metrics()["optx/lr"] == 0.5
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for taken in (0.5, 0.25):
            w.grad = torch.ones(2)
            opt.step()
            scheduler.step()
            assert opt.metrics()["optx/lr"] == taken
        opt.load_state_dict(opt.state_dict())
        assert opt.metrics()["optx/lr"] == 0.125  # of a step to come: no step is known


@optx.rule(writes="large")
def count_large(w, limit):
    return optx.ops.where(optx.ops.abs(w) > limit, 1.0, 0.0)


class Large(optx.Transform):
    """Counts weights above a limit, and does nothing else."""

    name = "large"
    rules = {"meter": count_large}  # noqa: RUF012

    def __init__(self):
        self.options = {"limit": 1.0}

    def metrics(self, optimizer):
        count = optimizer.measured.sum("large.large")
        return {} if count is None else {"count": count}


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_transform_of_your_own_meters_what_the_step_left(fused):
    w = nn.Parameter(torch.tensor([0.5, 1.5, -2.5]))
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), Large(), fused=fused)
    assert "large/count" not in opt.metrics()
    w.grad = torch.tensor([-1.0, 1.0, 0.0])
    opt.step()
    assert opt.metrics()["large/count"] == 2.0


def test_a_rule_that_meters_gradients_is_refused():
    @optx.rule(writes="energy")
    def energy(g):
        return g * g

    class Energy(optx.Transform):
        name = "energy"
        rules = {"meter": energy}  # noqa: RUF012

    with pytest.raises(optx.TransformError, match="reads 'g' in meter"):
        optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2))]), Energy())
