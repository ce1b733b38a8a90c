"""torch's RMSprop, Adagrad and Adadelta as rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import PLAIN, SIGNED, SQUARES, coupled_decay, given, start
from optx.ops import sqrt
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.transform import Group


@rule(writes="gain")
def rmsprop_scalars(alpha: Any) -> Any:
    """In float64: ``1 - 0.99`` in float32 is off by 1e-6."""
    return 1.0 - alpha


@rule(writes=("square_avg", "unit"))
def rmsprop_scale(g: Any, square_avg: Any, alpha: Any, gain: Any, eps: Any) -> Any:
    """The gradient over the root of its mean square (Hinton 2012)."""
    new = square_avg * alpha + gain * g * g
    return new, g / (sqrt(new) + eps)


@rule(writes=("square_avg", "grad_avg", "unit"))
def rmsprop_centered(g: Any, square_avg: Any, grad_avg: Any, alpha: Any, gain: Any, eps: Any) -> Any:
    """The gradient over its standard deviation (Graves 2013)."""
    square, mean = square_avg * alpha + gain * g * g, grad_avg + gain * (g - grad_avg)
    return square, mean, g / (sqrt(square - mean * mean) + eps)


@rule(writes="w")
def rmsprop_update(w: Any, unit: Any, lr: Any) -> Any:
    """RMSprop's step."""
    return w - lr * unit


@rule(writes=("w", "momentum_buffer"))
def rmsprop_momentum(w: Any, unit: Any, momentum_buffer: Any, momentum: Any, lr: Any) -> Any:
    """RMSprop's step with momentum."""
    new = momentum_buffer * momentum + unit
    return w - lr * new, new


@rule(writes="step_size")
def adagrad_scalars(lr: Any, lr_decay: Any, step: Any) -> Any:
    """``lr_decay``."""
    return lr / (1.0 + (step - 1.0) * lr_decay)


@rule(writes=("w", "sum"))
def adagrad_update(w: Any, g: Any, sum: Any, step_size: Any, eps: Any) -> Any:
    """Adagrad's step (Duchi et al. 2011)."""
    new = sum + g * g
    return w - step_size * g / (sqrt(new) + eps), new


@rule(writes="gain")
def adadelta_scalars(rho: Any) -> Any:
    """In float64, as RMSprop's."""
    return 1.0 - rho


@rule(writes=("w", "square_avg", "acc_delta"))
def adadelta_update(
    w: Any, g: Any, square_avg: Any, acc_delta: Any, rho: Any, gain: Any, eps: Any, lr: Any
) -> Any:
    """Adadelta's step (Zeiler 2012, algorithm 1)."""
    square = square_avg * rho + gain * g * g
    delta = sqrt(acc_delta + eps) / sqrt(square + eps) * g
    return w - lr * delta, square, acc_delta * rho + gain * delta * delta


def _start(group: Group) -> tuple[bool, str]:
    return bool(group["maximize"]), coupled_decay(group)


def rmsprop(group: Group, _: Any) -> BaseRules:
    """RMSprop's rules."""
    return _rmsprop(*_start(group), bool(group["centered"]), given(group, "momentum"))


@functools.cache
def _rmsprop(maximize: bool, decay: str, centered: bool, momentum: bool) -> BaseRules:
    slots = {"square_avg": SQUARES}
    slots |= {"momentum_buffer": SIGNED} if momentum else {}
    slots |= {"grad_avg": SIGNED} if centered else {}
    update = (
        *start(maximize, decay),
        rmsprop_centered if centered else rmsprop_scale,
        rmsprop_momentum if momentum else rmsprop_update,
    )
    return BaseRules(update, (rmsprop_scalars,), slots, counted=True)


def adagrad(group: Group, base: Any) -> BaseRules:
    """Adagrad's rules; state that is made late begins with the optimizer's value, not with the group's."""
    return _adagrad(*_start(group), base.defaults["initial_accumulator_value"])


@functools.cache
def _adagrad(maximize: bool, decay: str, first: float) -> BaseRules:
    update = (*start(maximize, decay), adagrad_update)
    return BaseRules(update, (adagrad_scalars,), {"sum": PLAIN}, {"sum": first}, counted=True)


def adadelta(group: Group, _: Any) -> BaseRules:
    """Adadelta's rules."""
    return _adadelta(*_start(group))


@functools.cache
def _adadelta(maximize: bool, decay: str) -> BaseRules:
    slots = {"square_avg": SQUARES, "acc_delta": SQUARES}
    update = (*start(maximize, decay), adadelta_update)
    return BaseRules(update, (adadelta_scalars,), slots, counted=True)


register_base(torch.optim.RMSprop, rmsprop)
register_base(torch.optim.Adagrad, adagrad)
register_base(torch.optim.Adadelta, adadelta)
