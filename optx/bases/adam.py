"""torch's Adam and AdamW as rules.

Scalars are rules of their own and run in float64: ``1 - beta2`` in float32 is off by 5e-5 at 0.999.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import SIGNED, SQUARES, given, start, torch_decay
from optx.ops import maximum, sqrt
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.transform import Group


@rule(writes=("step_size", "correction2", "keep", "gain1", "gain2"))
def adam_scalars(lr: Any, beta1: Any, beta2: Any, weight_decay: Any, step: Any) -> Any:
    """Bias corrections (Kingma & Ba 2015, section 3) and the constants of one Adam step."""
    return (
        lr / (1.0 - beta1**step),
        sqrt(1.0 - beta2**step),
        1.0 - lr * weight_decay,
        1.0 - beta1,
        1.0 - beta2,
    )


@rule(writes=("exp_avg", "exp_avg_sq"))
def adam_moments(g: Any, exp_avg: Any, exp_avg_sq: Any, gain1: Any, beta2: Any, gain2: Any) -> Any:
    """Moving averages of the gradient and its square."""
    return exp_avg + gain1 * (g - exp_avg), exp_avg_sq * beta2 + gain2 * g * g


@rule(writes="w")
def adam_update(w: Any, exp_avg: Any, exp_avg_sq: Any, step_size: Any, correction2: Any, eps: Any) -> Any:
    """Adam's step."""
    return w - step_size * exp_avg / (sqrt(exp_avg_sq) / correction2 + eps)


@rule(writes=("w", "max_exp_avg_sq"))
def amsgrad_update(
    w: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, step_size: Any, correction2: Any, eps: Any
) -> Any:
    """Adam's step with the largest second moment so far (Reddi et al. 2018)."""
    largest = maximum(max_exp_avg_sq, exp_avg_sq)
    return w - step_size * exp_avg / (sqrt(largest) / correction2 + eps), largest


def adam(group: Group, _: Any) -> BaseRules:
    """Adam's rules."""
    return _adam(bool(group["amsgrad"]), bool(group["maximize"]), torch_decay(group))


def adamw(group: Group, _: Any) -> BaseRules:
    """AdamW's rules."""
    decay = "by lr" if given(group, "weight_decay") else ""
    return _adam(bool(group["amsgrad"]), bool(group["maximize"]), decay)


@functools.cache
def _adam(amsgrad: bool, maximize: bool, decay: str) -> BaseRules:
    slots = {"exp_avg": SIGNED, "exp_avg_sq": SQUARES}
    if amsgrad:
        slots["max_exp_avg_sq"] = SQUARES
    update = (
        *start(maximize, decay),
        adam_moments,
        amsgrad_update if amsgrad else adam_update,
    )
    return BaseRules(update, (adam_scalars,), slots, counted=True)


register_base(torch.optim.Adam, adam)
register_base(torch.optim.AdamW, adamw)
