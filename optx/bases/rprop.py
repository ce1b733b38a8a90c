"""torch's Rprop as rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import PLAIN, start
from optx.ops import maximum, minimum, sign, where
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.transform import Group


@rule(writes=("step_size", "prev"))
def rprop_size(
    g: Any, prev: Any, step_size: Any, eta1: Any, eta2: Any, step_size1: Any, step_size2: Any
) -> Any:
    """Longer steps while the gradient keeps its sign, shorter and none where it turned (Riedmiller 1993)."""
    turned = g * prev
    factor = where(turned > 0.0, eta2, where(turned < 0.0, eta1, 1.0))
    size = minimum(maximum(step_size * factor, step_size1), step_size2)
    return size, where(turned < 0.0, 0.0, g)


@rule(writes="w")
def rprop_update(w: Any, prev: Any, step_size: Any) -> Any:
    """A step of that size against the sign."""
    return w - sign(prev) * step_size


def rprop(group: Group, _: Any) -> BaseRules:
    """Rprop's rules."""
    return _rprop(bool(group["maximize"]))


@functools.cache
def _rprop(maximize: bool) -> BaseRules:
    update = (*start(maximize, ""), rprop_size, rprop_update)
    return BaseRules(update, (), {"prev": PLAIN, "step_size": PLAIN}, {"step_size": "lr"}, counted=True)


register_base(torch.optim.Rprop, rprop)
