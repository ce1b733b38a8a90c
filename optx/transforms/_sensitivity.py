"""DSP-Reg's S: how it goes on, what of a step's spreads it is made of, and what it is divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optx._names import parameter_names, whole
from optx._rules import rule
from optx.ops import maximum, where
from optx.step.step_moments import Moments
from optx.step.transform import Host, Transform
from optx.transforms._domain_gradients import local

# ---- the step's numbers: one for each tensor, or for all --------------------------------------------------


@rule(writes=("known", "new"))
def both(sensitivity: Any, spread: Any) -> Any:
    """Summed: the smoothed variance before this step, and this step's."""
    return sensitivity, spread


@rule(writes=("keep", "strength", "count"))
def advance(count: Any, chosen: Any, ema: Any, weight: Any, warmup: Any, lr: Any) -> Any:
    """How much of the old average stays, and the penalty's strength; a step with lr 0 is a rehearsal."""
    zero = 0.0 * count
    keep = where(lr > 0.0, where(count > 0.0, ema + zero, zero), 1.0 + zero)
    strength = where(count < warmup, zero, weight + zero) * chosen
    return keep, strength, count + where(lr > 0.0, 1.0 + zero, zero)


@rule(writes=("keep", "strength", "count", "sensed", "counted"))
def advance_and_add(
    known: Any, new: Any, numel: Any, count: Any, chosen: Any, ema: Any, weight: Any, warmup: Any, lr: Any
) -> Any:
    """The same, and the sum of S after this step."""
    keep, strength, count = advance(count, chosen, ema, weight, warmup, lr)
    return keep, strength, count, chosen * (keep * known + (1.0 - keep) * new), chosen * numel


@rule(writes="rate")
def over_all(strength: Any, total_sensed: Any, total_counted: Any, eps: Any) -> Any:
    """lambda / (mean S + eps), the mean over everything that is regularised."""
    return strength / (total_sensed / maximum(total_counted, 1.0) + eps)


@rule(writes="rate")
def over_layer(strength: Any, sensed: Any, counted: Any, eps: Any) -> Any:
    """The mean of this tensor alone."""
    return strength / (sensed / maximum(counted, 1.0 + 0.0 * counted) + eps)


@rule(writes="rate")
def over_peak(strength: Any, peak: Any, eps: Any) -> Any:
    """The largest S of all."""
    return strength / (peak + eps)


@rule(writes="rate")
def over_nothing(strength: Any) -> Any:
    """S as it is."""
    return strength * 1.0


@rule(writes=("sensed", "counted"))
def left(sensitivity: Any, chosen: Any) -> Any:
    """Metered, where the step itself asks for no mean: S as it is kept, and how many numbers have one."""
    return sensitivity * chosen, chosen + 0.0 * sensitivity


def normalised(last: Moments, norm: str) -> Moments:
    """A penalty, with what its S is divided by."""
    if norm == "mean":
        totals = ("sensed", "counted")
        return replace(last, sums=both, scalars=advance_and_add, totals=totals, finish=over_all)
    if norm == "layer":
        return replace(last, sums=both, scalars=advance_and_add, finish=over_layer)
    return replace(last, scalars=advance, finish=over_peak if norm == "max" else over_nothing, meter=left)


# ---- S as it is kept --------------------------------------------------------------------------------------


def sensitivities(dsp: Any, optimizer: Host, chosen: Sequence[Tensor]) -> dict[str, Tensor]:
    """S^ of each of these weights by name, where a step has been taken with it."""
    names = parameter_names(optimizer.base, dsp.model)
    key = f"optx.{dsp.name}."
    kept = {
        p: slots[key + "sensitivity"]
        for p in chosen
        if float((slots := optimizer.slot_store.of(p)).get(key + "count", 0.0)) > 0.0
    }
    eps = _by_parameter(dsp, optimizer, "eps")
    over = divisors(kept, dsp.norm)
    return {names[id(p)]: s / (over[p] + eps[p] if over[p] else 1.0) for p, s in kept.items()}


def divisors(kept: Mapping[Tensor, Tensor], norm: str) -> dict[Tensor, float]:
    """What each S is divided by, without eps; 0 where it is left as it is."""
    if norm == "none":
        return dict.fromkeys(kept, 0.0)
    if norm == "max":
        return dict.fromkeys(kept, max((float(s.max()) for s in kept.values() if s.numel()), default=0.0))
    sums = {p: float(whole(s.sum(dtype=torch.float64))) for p, s in kept.items()}
    if norm == "layer":
        return {p: sums[p] / max(1, s.numel()) for p, s in kept.items()}
    return dict.fromkeys(kept, sum(sums.values()) / max(1, sum(s.numel() for s in kept.values())))


def summary(dsp: Any, optimizer: Host) -> dict[str, float]:
    """The mean S of all that the last step regularised, and the largest strength of the penalty in it."""
    measured, found = optimizer.measured, dict[str, float]()
    sensed, counted = (measured.sum(f"{dsp.name}.{what}") for what in ("sensed", "counted"))
    if sensed is None and measured:  # the step took no sum of it
        having = measured.having(f"{dsp.name}.strength")
        served = (p for p in optimizer.served(dsp) if id(p) in having)
        slots = [s for p in served if float((s := optimizer.slot_store.of(p))[f"optx.{dsp.name}.chosen"]) > 0]
        known = [s[f"optx.{dsp.name}.sensitivity"] for s in slots]
        sensed = sum(float(whole(s.sum(dtype=torch.float64))) for s in known)
        counted = float(sum(s.numel() for s in known))
    if sensed is not None and counted:
        found["sensitivity"] = sensed / counted
    if strengths := measured.of(f"{dsp.name}.strength"):
        found["strength"] = max(strengths.values())
    return found


def rescale(spreads: Sequence[Tensor], scale: float) -> None:
    """Free variances of what the losses were multiplied by."""
    if scale != 1.0:
        for spread in spreads:
            spread.mul_(1.0 / scale**2)


def keep_from_below_0(dsp: Transform, optimizer: Host, acting: Sequence[Tensor]) -> None:
    """Raise this step's spreads, which may be below 0, to where S stays at 0 or above.

    So S itself is cut off, and not each step's spread: of that, most would be the noise's upper half.
    """
    ema = _by_parameter(dsp, optimizer, "ema")
    for p in acting:
        known, new = (local(optimizer.slot(p, dsp, name)) for name in ("sensitivity", "spread"))
        keep = float(ema[p]) if float(optimizer.slot(p, dsp, "count")) > 0.0 else 0.0
        # A little less than S allows, so that what rounding leaves is not below 0.
        lowest = known * (-(1.0 - 1e-5) * keep / (1.0 - keep)) if 0.0 < keep < 1.0 else torch.zeros_like(new)
        torch.maximum(new, lowest, out=new)


def find_peak(dsp: Transform, optimizer: Host, acting: Sequence[Tensor]) -> None:
    """The largest S of all, as this step will leave it."""
    ema = _by_parameter(dsp, optimizer, "ema")
    largest: list[Tensor] = []
    for p in acting:
        slots = [optimizer.slot(p, dsp, n) for n in ("sensitivity", "spread", "count", "chosen")]
        known, new, count, chosen = slots
        keep = torch.where(count > 0, float(ema[p]), 0.0).to(known.dtype)
        if p.numel():
            largest.append((torch.lerp(new, known, keep).max() * chosen).to(acting[0].device))
    for p in acting:
        peak = optimizer.slot(p, dsp, "peak")
        peak.copy_(torch.stack(largest).max() if largest else torch.zeros(()))


def _by_parameter(dsp: Transform, optimizer: Host, option: str) -> dict[Tensor, Any]:
    key, default = f"{dsp.name}_{option}", getattr(dsp, option)
    return {p: group.get(key, default) for group in optimizer.param_groups for p in group["params"]}
