"""torch's SGD as rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import SIGNED, coupled_decay, given, start
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.transform import Group


@rule(writes="gain")
def momentum_scalars(dampening: Any, fresh: Any) -> Any:
    """torch starts the buffer at the first gradient itself, undampened."""
    return 1.0 - dampening * (1.0 - fresh)


@rule(writes="momentum_buffer")
def momentum_update(momentum_buffer: Any, g: Any, momentum: Any, gain: Any) -> Any:
    """SGD's momentum buffer."""
    return momentum * momentum_buffer + gain * g


@rule(writes="g")
def take_buffer(momentum_buffer: Any) -> Any:
    """Step along the buffer."""
    return momentum_buffer * 1.0


@rule(writes="g")
def look_ahead(g: Any, momentum_buffer: Any, momentum: Any) -> Any:
    """Nesterov's step."""
    return g + momentum * momentum_buffer


@rule(writes="w")
def descend(w: Any, g: Any, lr: Any) -> Any:
    """SGD's step."""
    return w - lr * g


def sgd(group: Group, _: Any) -> BaseRules:
    """SGD's rules."""
    return _sgd(
        bool(group["maximize"]), coupled_decay(group), given(group, "momentum"), bool(group["nesterov"])
    )


@functools.cache
def _sgd(maximize: bool, decay: str, momentum: bool, nesterov: bool) -> BaseRules:
    if not momentum:
        return BaseRules((*start(maximize, decay), descend))
    step = look_ahead if nesterov else take_buffer
    update = (*start(maximize, decay), momentum_update, step, descend)
    return BaseRules(update, (momentum_scalars,), {"momentum_buffer": SIGNED})


register_base(torch.optim.SGD, sgd)
