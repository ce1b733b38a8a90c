"""Adan as rules: pytorch_optimizer's (Xie et al. 2022, arXiv 2208.06677)."""

from __future__ import annotations

import functools
from typing import Any

from optx._rules import rule
from optx.bases._common import PLAIN, SIGNED, SQUARES, asked_for, given, register_library, shrink
from optx.ops import sqrt, where
from optx.step.base_update import BaseRules
from optx.step.transform import Group


@rule(writes=("size1", "size2", "root3", "gain1", "gain2", "gain3", "keep"))
def adan_scalars(lr: Any, beta1: Any, beta2: Any, beta3: Any, weight_decay: Any, step: Any) -> Any:
    """Bias corrections and the constants of a step."""
    return (
        lr / (1.0 - beta1**step),
        lr * beta2 / (1.0 - beta2**step),
        sqrt(1.0 - beta3**step),
        1.0 - beta1,
        1.0 - beta2,
        1.0 - beta3,
        1.0 - lr * weight_decay,
    )


@rule(writes="keep_after")
def adan_decay(lr: Any, weight_decay: Any) -> Any:
    """Weight decay as the paper has it, implicitly."""
    return 1.0 / (1.0 + lr * weight_decay)


@rule(writes=("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"))
def adan_moments(
    g: Any,
    exp_avg: Any,
    exp_avg_diff: Any,
    exp_avg_sq: Any,
    previous_grad: Any,
    fresh: Any,
    gain1: Any,
    gain2: Any,
    gain3: Any,
    beta2: Any,
    beta3: Any,
) -> Any:
    """Averages of the gradient, of its change, and of the square of where they lead."""
    change = where(fresh > 0.5, 0.0, previous_grad + g)
    ahead = change * beta2 + g
    return (
        exp_avg + gain1 * (g - exp_avg),
        exp_avg_diff + gain2 * (change - exp_avg_diff),
        exp_avg_sq * beta3 + gain3 * ahead * ahead,
        -g,
    )


@rule(writes="w")
def adan_update(
    w: Any, exp_avg: Any, exp_avg_diff: Any, exp_avg_sq: Any, size1: Any, size2: Any, root3: Any, eps: Any
) -> Any:
    """Adan's step."""
    return w - (size1 * exp_avg + size2 * exp_avg_diff) / (sqrt(exp_avg_sq) / root3 + eps)


@rule(writes="w")
def shrink_after(w: Any, keep_after: Any) -> Any:
    """The decay, after the step."""
    return w * keep_after


def adan(group: Group, base: Any) -> BaseRules | str:
    """Adan's rules."""
    if base.maximize:
        return "its rules don't know maximize=True, whose first step takes a change that is none"
    if base.defaults["max_grad_norm"] != 0.0:
        return "its rules don't know max_grad_norm, which waits for all gradients; optx.Clip clips them"
    why = asked_for(group, ("use_gc", "adanorm"))
    decays = given(group, "weight_decay")
    return why or _adan(decays and bool(group["weight_decouple"]), decays and not group["weight_decouple"])


@functools.cache
def _adan(decoupled: bool, implicit: bool) -> BaseRules:
    update = (
        adan_moments,
        *((shrink,) if decoupled else ()),
        adan_update,
        *((shrink_after,) if implicit else ()),
    )
    slots = {"exp_avg": SIGNED, "exp_avg_sq": SQUARES, "exp_avg_diff": SIGNED, "previous_grad": PLAIN}
    scalars = (adan_scalars, *((adan_decay,) if implicit else ()))
    return BaseRules(update, scalars, slots, counted="group")


register_library("pytorch_optimizer.Adan", adan, "4.1")
