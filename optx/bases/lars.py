"""pytorch_optimizer's LARS as rules (You et al. 2017, arXiv 1708.03888).

A matrix's gradient is scaled to its own length: both norms are summed in one pass before the update. Vectors
and scalars take SGD's step.
"""

from __future__ import annotations

import functools
from typing import Any

from optx._rules import rule
from optx.bases._common import SIGNED, given, register_library, turned
from optx.bases.sgd import descend, look_ahead, take_buffer
from optx.ops import sqrt, where
from optx.step.base_update import BaseRules, Sums
from optx.step.transform import Group


@rule(writes="gain")
def undampened(dampening: Any) -> Any:
    """What the momentum takes of the gradient."""
    return 1.0 - dampening


@rule(writes=("weight_sq", "gradient_sq"))
def lengths(w: Any, g: Any) -> Any:
    """Summed, the squared norms."""
    return w * w, g * g


@rule(writes=("trust", "decay"))
def ratio(weight_sq: Any, gradient_sq: Any, weight_decay: Any, trust_coefficient: Any, ndim: Any) -> Any:
    """The trust ratio (equation 6), and the weight decay that a tensor has."""
    weight, whole = sqrt(weight_sq), sqrt(gradient_sq) + weight_decay * sqrt(weight_sq)
    scales = (ndim > 1.0) & (weight > 0.0) & (whole > 0.0)
    trust = where(scales, trust_coefficient * weight / where(scales, whole, 1.0), 1.0)
    return trust, where(ndim > 1.0, weight_decay, 0.0)


@rule(writes="g")
def scale(w: Any, g: Any, trust: Any, decay: Any) -> Any:
    """Coupled weight decay, and the layer's own rate."""
    return (g + decay * w) * trust


@rule(writes="momentum_buffer")
def gather(momentum_buffer: Any, g: Any, momentum: Any, gain: Any) -> Any:
    """The momentum, which begins at zero."""
    return momentum * momentum_buffer + gain * g


def lars(group: Group, base: Any) -> BaseRules:
    """LARS's rules."""
    return _lars(bool(base.maximize), given(group, "momentum"), bool(group["nesterov"]))


@functools.cache
def _lars(maximize: bool, momentum: bool, nesterov: bool) -> BaseRules:
    moves = (gather, look_ahead if nesterov else take_buffer) if momentum else ()
    return BaseRules(
        update=(*turned(maximize), Sums(lengths, then=ratio), scale, *moves, descend),
        scalars=(undampened,) if momentum else (),
        slots={"momentum_buffer": SIGNED} if momentum else {},
        counted="group",
    )


register_library("pytorch_optimizer.LARS", lars, "4.1")
