"""torch_optimizer's Lamb as rules (You et al. 2020, arXiv 1904.00962, algorithm 2).

A tensor's step is as long as the tensor, times the learning rate: its norm and its direction's are summed by
a pass that computes the direction and stores nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import Rule, rule
from optx.bases._common import SIGNED, SQUARES, given, lengths, register_library
from optx.bases.adam import adam_moments
from optx.ops import minimum, sqrt, where
from optx.step.base_update import BaseRules, Sums
from optx.step.declared import per_tensor
from optx.step.transform import Group


@rule(writes=("pace", "gain1", "gain2"))
def plain_pace(lr: Any, beta1: Any, beta2: Any) -> Any:
    """The paper's third version has no bias correction."""
    return lr * 1.0, 1.0 - beta1, 1.0 - beta2


@rule(writes=("pace", "gain1", "gain2"))
def debiased_pace(lr: Any, beta1: Any, beta2: Any, step: Any) -> Any:
    """``debias=True``."""
    return lr * sqrt(1.0 - beta2**step) / (1.0 - beta1**step), 1.0 - beta1, 1.0 - beta2


@rule(writes="direction")
def direction(exp_avg: Any, exp_avg_sq: Any, eps: Any) -> Any:
    """Adam's."""
    return exp_avg / (sqrt(exp_avg_sq) + eps)


@rule(writes="direction")
def decayed_direction(w: Any, exp_avg: Any, exp_avg_sq: Any, eps: Any, weight_decay: Any) -> Any:
    """With weight decay, which counts for its length."""
    return exp_avg / (sqrt(exp_avg_sq) + eps) + weight_decay * w


@functools.cache
def trust(clamp_value: float, adam: bool) -> Rule:
    """The trust ratio, for settings that the optimizer keeps beside its groups."""
    uses = 0.0 if adam else 1.0

    @rule(writes=("weight_norm", "adam_norm", "trust_ratio", "rate"))
    def ratio(weight_sq: Any, direction_sq: Any, pace: Any) -> Any:
        weight_norm, adam_norm = minimum(sqrt(weight_sq), clamp_value), sqrt(direction_sq)
        none = (weight_norm == 0.0) | (adam_norm == 0.0)
        found = where(none, 1.0, weight_norm / where(none, 1.0, adam_norm))
        return weight_norm, adam_norm, found, pace * (uses * found + (1.0 - uses))

    return ratio


@rule(writes="w")
def walk(w: Any, direction: Any, rate: Any) -> Any:
    """The step."""
    return w - rate * direction


def lamb(group: Group, base: Any) -> BaseRules:
    """Lamb's rules."""
    return _lamb(given(group, "weight_decay"), float(base.clamp_value), bool(base.adam), bool(base.debias))


@functools.cache
def _lamb(decays: bool, clamp_value: float, adam: bool, debias: bool) -> BaseRules:
    norms = dict.fromkeys(("weight_norm", "adam_norm", "trust_ratio"), per_tensor(torch.float32))
    return BaseRules(
        update=(
            adam_moments,
            decayed_direction if decays else direction,
            Sums(lengths, then=trust(clamp_value, adam)),
            walk,
        ),
        scalars=(debiased_pace if debias else plain_pace,),
        slots={"exp_avg": SIGNED, "exp_avg_sq": SQUARES, **norms},
        counted="number",
    )


register_library("torch_optimizer.Lamb", lamb, "0.3")
