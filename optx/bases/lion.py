"""Lion as rules: pytorch_optimizer's (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

import functools
from typing import Any

from optx._rules import rule
from optx.bases._common import SIGNED, asked_for, decay_of, gains, keeps, register_library, start
from optx.ops import sign
from optx.step.base_update import BaseRules
from optx.step.transform import Group


@rule(writes=("w", "exp_avg"))
def lion_update(w: Any, g: Any, exp_avg: Any, gain1: Any, gain2: Any, lr: Any) -> Any:
    """A step along the sign of one average, of which another is kept."""
    way = sign(exp_avg + gain1 * (g - exp_avg))
    return w - lr * way, exp_avg + gain2 * (g - exp_avg)


def lion(group: Group, base: Any) -> BaseRules | str:
    """Lion's rules."""
    why = asked_for(group, ("use_gc", "adanorm", "cautious"))
    return why or _lion(bool(base.maximize), decay_of(group))


@functools.cache
def _lion(maximize: bool, decay: str) -> BaseRules:
    update = (*start(maximize, decay), lion_update)
    return BaseRules(update, (*keeps(decay), gains), {"exp_avg": SIGNED}, counted="group")


register_library("pytorch_optimizer.Lion", lion, "4.1")
