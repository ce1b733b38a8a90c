"""torch's NAdam, RAdam and Adamax as rules."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import PLAIN, SIGNED, SQUARES, debiasing, keeps, start, torch_decay
from optx.bases.adam import adam_moments
from optx.ops import abs, exp, maximum, sqrt, where
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.declared import Slot
from optx.step.transform import Group

_LOG = math.log(0.96)


@rule(writes=("g_size", "m_size", "correction", "gain1", "gain2", "mu_product"))
def nadam_scalars(lr: Any, beta1: Any, beta2: Any, momentum_decay: Any, step: Any, mu_product: Any) -> Any:
    """The momentum's schedule, and its product (Dozat 2016)."""
    mu = beta1 * (1.0 - 0.5 * exp(_LOG * step * momentum_decay))
    next_mu = beta1 * (1.0 - 0.5 * exp(_LOG * (step + 1.0) * momentum_decay))
    product = mu_product * mu
    return (
        lr * (1.0 - mu) / (1.0 - product),
        lr * next_mu / (1.0 - product * next_mu),
        1.0 - beta2**step,
        1.0 - beta1,
        1.0 - beta2,
        product,
    )


@rule(writes="w")
def nadam_update(
    w: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, g_size: Any, m_size: Any, correction: Any, eps: Any
) -> Any:
    """A step along the gradient and its average."""
    return w - (g_size * g + m_size * exp_avg) / (sqrt(exp_avg_sq / correction) + eps)


@rule(writes=("size", "adapts", "gain1", "gain2"))
def radam_scalars(lr: Any, beta1: Any, beta2: Any, step: Any) -> Any:
    """The rectification, where the second moment's variance is tractable (Liu et al. 2020, algorithm 2)."""
    correction2 = 1.0 - beta2**step
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2**step / correction2
    adapts = rho > 5.0
    rect = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    size = lr / (1.0 - beta1**step)
    rectified = size * sqrt(where(adapts, rect, 1.0)) * sqrt(correction2)
    return where(adapts, rectified, size), where(adapts, 1.0, 0.0), 1.0 - beta1, 1.0 - beta2


@rule(writes="w")
def radam_update(w: Any, exp_avg: Any, exp_avg_sq: Any, size: Any, adapts: Any, eps: Any) -> Any:
    """Adam's step, or before that one along the average."""
    return w - size * where(adapts > 0.5, exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg)


@rule(writes=("exp_avg", "exp_inf"))
def adamax_moments(g: Any, exp_avg: Any, exp_inf: Any, gain1: Any, beta2: Any, eps: Any) -> Any:
    """The gradient's average and its largest magnitude, which is forgotten slowly (Kingma & Ba 2015)."""
    return exp_avg + gain1 * (g - exp_avg), maximum(exp_inf * beta2, abs(g) + eps)


@rule(writes="w")
def adamax_update(w: Any, exp_avg: Any, exp_inf: Any, step_size: Any) -> Any:
    """Adamax's step."""
    return w - step_size * exp_avg / exp_inf


def nadam(group: Group, _: Any) -> BaseRules:
    """NAdam's rules."""
    return _nadam(bool(group["maximize"]), torch_decay(group))


@functools.cache
def _nadam(maximize: bool, decay: str) -> BaseRules:
    return BaseRules(
        (*start(maximize, decay), adam_moments, nadam_update),
        (*keeps(decay), nadam_scalars),
        {"mu_product": Slot(torch.float32, scalar=True), "exp_avg": SIGNED, "exp_avg_sq": SQUARES},
        {"mu_product": 1.0},
        counted=True,
    )


def radam(group: Group, _: Any) -> BaseRules:
    """RAdam's rules."""
    return _radam(bool(group["maximize"]), torch_decay(group))


@functools.cache
def _radam(maximize: bool, decay: str) -> BaseRules:
    return BaseRules(
        (*start(maximize, decay), adam_moments, radam_update),
        (*keeps(decay), radam_scalars),
        {"exp_avg": SIGNED, "exp_avg_sq": SQUARES},
        counted=True,
    )


def adamax(group: Group, _: Any) -> BaseRules:
    """Adamax's rules."""
    return _adamax(bool(group["maximize"]), torch_decay(group))


@functools.cache
def _adamax(maximize: bool, decay: str) -> BaseRules:
    slots = {"exp_avg": SIGNED, "exp_inf": PLAIN}
    return BaseRules(
        (*start(maximize, decay), adamax_moments, adamax_update), debiasing(""), slots, counted=True
    )


register_base(torch.optim.NAdam, nadam)
register_base(torch.optim.RAdam, radam)
register_base(torch.optim.Adamax, adamax)
