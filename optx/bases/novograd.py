"""NovoGrad as rules: pytorch_optimizer's and torch_optimizer's (Ginsburg et al. 2019, arXiv 1905.11286)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import (
    SIGNED,
    asked_for,
    coupled_decay,
    decay_of,
    decayed,
    keeps,
    register_library,
    turned,
)
from optx.ops import maximum, sqrt, where
from optx.step.base_update import BaseRules, Sums
from optx.step.declared import Slot
from optx.step.transform import Group


@rule(writes="norm")
def square(g: Any) -> Any:
    """Summed, a layer's squared gradient norm."""
    return g * g


@rule(writes=("exp_avg_sq", "over"))
def layer_norm(norm: Any, exp_avg_sq: Any, beta2: Any, eps: Any) -> Any:
    """The layer's second moment, which begins with the first that is not 0."""
    new = where(exp_avg_sq == 0.0, norm, exp_avg_sq * beta2 + (1.0 - beta2) * norm)
    return new, 1.0 / (sqrt(new) + eps)


@rule(writes=("exp_avg_sq", "max_exp_avg_sq", "over"))
def largest_norm(norm: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, beta2: Any, eps: Any) -> Any:
    """``amsgrad=True``."""
    new = where(exp_avg_sq == 0.0, norm, exp_avg_sq * beta2 + (1.0 - beta2) * norm)
    most = maximum(max_exp_avg_sq, new)
    return new, most, 1.0 / (sqrt(most) + eps)


@rule(writes=("grads_ema", "over"))
def fresh_norm(norm: Any, grads_ema: Any, fresh: Any, beta2: Any, eps: Any) -> Any:
    """The layer's second moment, which begins with the first."""
    new = where(fresh > 0.5, norm, grads_ema + (1.0 - beta2) * (norm - grads_ema))
    return new, 1.0 / (sqrt(new) + eps)


@rule(writes="g")
def normalise(g: Any, over: Any) -> Any:
    """The gradient over the layer's norm."""
    return g * over


@rule(writes="share")
def whole_share(beta1: Any) -> Any:
    """What the average takes of the gradient: all of it."""
    return 1.0 + 0.0 * beta1


@rule(writes="share")
def averaged_share(beta1: Any) -> Any:
    """``grad_averaging=True``."""
    return 1.0 - beta1


@rule(writes=("w", "exp_avg"))
def novograd_update(w: Any, g: Any, exp_avg: Any, beta1: Any, share: Any, lr: Any) -> Any:
    """NovoGrad's step."""
    new = exp_avg * beta1 + share * g
    return w - lr * new, new


@rule(writes=("w", "moments"))
def fresh_update(w: Any, g: Any, moments: Any, fresh: Any, beta1: Any, share: Any, lr: Any) -> Any:
    """The same, where the first gradient is taken whole."""
    new = where(fresh > 0.5, g, moments * beta1 + share * g)
    return w - lr * new, new


def torch_optimizer(group: Group, _: Any) -> BaseRules:
    """The rules of torch_optimizer's."""
    return _torch_optimizer(coupled_decay(group), bool(group["grad_averaging"]), bool(group["amsgrad"]))


@functools.cache
def _torch_optimizer(decay: str, averaging: bool, amsgrad: bool) -> BaseRules:
    number = Slot(torch.float32, scalar=True)
    slots = {"exp_avg": SIGNED, "exp_avg_sq": number}
    slots |= {"max_exp_avg_sq": number} if amsgrad else {}
    sums = Sums(square, largest_norm if amsgrad else layer_norm)
    update = (sums, normalise, *decayed(decay), novograd_update)
    return BaseRules(update, (averaged_share if averaging else whole_share,), slots, counted="number")


def pytorch_optimizer(group: Group, base: Any) -> BaseRules | str:
    """The rules of pytorch_optimizer's."""
    why = asked_for(group, ("adam_debias",))
    return why or _pytorch_optimizer(bool(base.maximize), decay_of(group), bool(group["grad_averaging"]))


@functools.cache
def _pytorch_optimizer(maximize: bool, decay: str, averaging: bool) -> BaseRules:
    slots = {"grads_ema": Slot(None, scalar=True), "moments": SIGNED}
    update = (*turned(maximize), Sums(square, fresh_norm), normalise, *decayed(decay), fresh_update)
    scalars = (*keeps(decay), averaged_share if averaging else whole_share)
    return BaseRules(update, scalars, slots, counted="group")


register_library("pytorch_optimizer.NovoGrad", pytorch_optimizer, "4.1")
register_library("torch_optimizer.NovoGrad", torch_optimizer, "0.3")
