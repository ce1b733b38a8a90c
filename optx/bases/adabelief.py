"""AdaBelief as rules: pytorch_optimizer's and torch_optimizer's (Zhuang et al. 2020, arXiv 2010.07468)."""

from __future__ import annotations

import functools
from typing import Any

from optx._rules import Rule, rule
from optx.bases._common import (
    SIGNED,
    SQUARES,
    asked_for,
    coupled_decay,
    debiasing,
    decay_of,
    register_library,
    start,
)
from optx.ops import maximum, sqrt
from optx.step.base_update import BaseRules, Counted
from optx.step.transform import Group


@rule(writes=("exp_avg", "exp_avg_var"))
def belief_moments(
    g: Any, exp_avg: Any, exp_avg_var: Any, gain1: Any, beta2: Any, gain2: Any, eps: Any
) -> Any:
    """The gradient's average and its variance about it; eps stays in it."""
    mean = exp_avg + gain1 * (g - exp_avg)
    rest = g - mean
    return mean, exp_avg_var * beta2 + gain2 * rest * rest + eps


@rule(writes=("exp_avg", "exp_avg_var"))
def bare_moments(g: Any, exp_avg: Any, exp_avg_var: Any, gain1: Any, beta2: Any, gain2: Any) -> Any:
    """The same, without eps."""
    mean = exp_avg + gain1 * (g - exp_avg)
    rest = g - mean
    return mean, exp_avg_var * beta2 + gain2 * rest * rest


@rule(writes="max_exp_avg_var")
def largest(max_exp_avg_var: Any, exp_avg_var: Any) -> Any:
    """``ams_bound=True``."""
    return maximum(max_exp_avg_var, exp_avg_var)


@rule(writes="max_exp_avg_var")
def largest_and_eps(max_exp_avg_var: Any, exp_avg_var: Any, eps: Any) -> Any:
    """``amsgrad=True``: here it is the largest that eps stays in."""
    return maximum(max_exp_avg_var, exp_avg_var) + eps


@rule(writes="w")
def belief_update(w: Any, exp_avg: Any, exp_avg_var: Any, step_size: Any, correction2: Any, eps: Any) -> Any:
    """AdaBelief's step."""
    return w - step_size * exp_avg / (sqrt(exp_avg_var) / correction2 + eps)


@rule(writes="w")
def bound_update(
    w: Any, exp_avg: Any, max_exp_avg_var: Any, step_size: Any, correction2: Any, eps: Any
) -> Any:
    """The same over the largest variance."""
    return w - step_size * exp_avg / (sqrt(max_exp_avg_var) / correction2 + eps)


def pytorch_optimizer(group: Group, base: Any) -> BaseRules | str:
    """The rules of pytorch_optimizer's."""
    why = asked_for(group, ("rectify", "adanorm"))
    bound = (largest,) if group["ams_bound"] else ()
    debias = bool(group.get("adam_debias", False))
    return why or _belief(bool(base.maximize), decay_of(group), debias, "group", (belief_moments, *bound))


def torch_optimizer(group: Group, base: Any) -> BaseRules | str:
    """The rules of torch_optimizer's."""
    if base._rectify:
        return "its rules don't know rectify=True"
    decay = coupled_decay(group)
    if base._weight_decouple and decay:
        decay = "fixed" if base._fixed_decay else "by lr"
    rules = (bare_moments, largest_and_eps) if group["amsgrad"] else (belief_moments,)
    return _belief(False, decay, False, "number", rules)


@functools.cache
def _belief(
    maximize: bool, decay: str, debias: bool, counted: Counted, moments: tuple[Rule, ...]
) -> BaseRules:
    slots = {"exp_avg": SIGNED, "exp_avg_var": SQUARES}
    bound = len(moments) > 1
    slots |= {"max_exp_avg_var": SQUARES} if bound else {}
    update = (*start(maximize, decay), *moments, bound_update if bound else belief_update)
    return BaseRules(update, debiasing(decay, debias), slots, counted=counted)


register_library("pytorch_optimizer.AdaBelief", pytorch_optimizer, "4.1")
register_library("torch_optimizer.AdaBelief", torch_optimizer, "0.3")
