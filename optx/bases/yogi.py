"""Yogi as rules: pytorch_optimizer's and torch_optimizer's (Zaheer et al. 2018)."""

from __future__ import annotations

import functools
from typing import Any

from optx._rules import rule
from optx.bases._common import SIGNED, SQUARES, coupled_decay, debiasing, decay_of, register_library, start
from optx.bases.adam import adam_update
from optx.ops import sign
from optx.step.base_update import BaseRules, Counted
from optx.step.transform import Group


@rule(writes=("exp_avg", "exp_avg_sq"))
def yogi_moments(g: Any, exp_avg: Any, exp_avg_sq: Any, gain1: Any, gain2: Any) -> Any:
    """The second moment moves by a share of the square, towards it."""
    square = g * g
    return exp_avg + gain1 * (g - exp_avg), exp_avg_sq - gain2 * sign(exp_avg_sq - square) * square


def pytorch_optimizer(group: Group, base: Any) -> BaseRules:
    """The rules of pytorch_optimizer's."""
    return _yogi(bool(base.maximize), decay_of(group), bool(group.get("adam_debias", False)), "group")


def torch_optimizer(group: Group, _: Any) -> BaseRules:
    """The rules of torch_optimizer's."""
    return _yogi(False, coupled_decay(group), False, "number")


@functools.cache
def _yogi(maximize: bool, decay: str, debias: bool, counted: Counted) -> BaseRules:
    first = "initial_accumulator"
    return BaseRules(
        (*start(maximize, decay), yogi_moments, adam_update),
        debiasing(decay, debias),
        {"exp_avg": SIGNED, "exp_avg_sq": SQUARES},
        {"exp_avg": first, "exp_avg_sq": first},
        counted=counted,
    )


register_library("pytorch_optimizer.Yogi", pytorch_optimizer, "4.1")
register_library("torch_optimizer.Yogi", torch_optimizer, "0.3")
