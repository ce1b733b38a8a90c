"""torch's Muon as rules (Jordan 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982).

The momentum's step is computed in one pass and orthogonalised by products of whole matrices, in bfloat16 and
batched by shape; a last pass writes momentum and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optx._rules import Rule, rule
from optx.bases._common import SIGNED
from optx.ops import maximum, sqrt
from optx.step.base_update import BaseRules, Matrices
from optx.step.bases import register_base
from optx.step.transform import Group


@rule(writes=("gain", "keep"))
def muon_scalars(momentum: Any, lr: Any, weight_decay: Any) -> Any:
    """What the momentum takes of the gradient, and what decay leaves."""
    return 1.0 - momentum, 1.0 - lr * weight_decay


@rule(writes="momentum_buffer")
def average(g: Any, momentum_buffer: Any, gain: Any) -> Any:
    """The momentum, a moving average."""
    return momentum_buffer + gain * (g - momentum_buffer)


@rule(writes="direction")
def plain(momentum_buffer: Any) -> Any:
    """A step along it."""
    return momentum_buffer * 1.0


@rule(writes="direction")
def nesterov(g: Any, momentum_buffer: Any, momentum: Any) -> Any:
    """A step along what it will be if the gradient stays."""
    return g + momentum * (momentum_buffer - g)


@rule(writes="rate")
def original(lr: Any, rows: Any, columns: Any) -> Any:
    """``adjust_lr_fn="original"``."""
    return lr * sqrt(maximum(1.0, rows / columns))


@rule(writes="rate")
def match_rms_adamw(lr: Any, rows: Any, columns: Any) -> Any:
    """``adjust_lr_fn="match_rms_adamw"``: steps are about as long as AdamW's."""
    return 0.2 * lr * sqrt(maximum(rows, columns))


@rule(writes="w")
def muon_step(w: Any, direction: Any, keep: Any, rate: Any) -> Any:
    """Decay and step."""
    return w * keep - rate * direction


_RATES: dict[str | None, Rule] = {None: original, "original": original, "match_rms_adamw": match_rms_adamw}


@functools.cache
def orthogonalise(
    coefficients: tuple[float, float, float], steps: int, eps: float
) -> Callable[[Tensor], Tensor]:
    """The Newton-Schulz iteration that brings all singular values of some matrices near 1."""
    a, b, c = coefficients

    def newton_schulz(stack: Tensor) -> Tensor:
        tall = stack.shape[1] > stack.shape[2]
        x = stack.mT if tall else stack
        functions: Any = torch.linalg
        x = x.div_(functions.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=eps))
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    return newton_schulz


def muon(group: Group, _: Any) -> BaseRules | str:
    """Muon's rules."""
    coefficients = tuple(map(float, group["ns_coefficients"]))
    steps, rate = group["ns_steps"], _RATES.get(group["adjust_lr_fn"])
    if len(coefficients) != 3 or not 0 <= steps < 100 or rate is None:
        return "its rules don't know these ns_coefficients, ns_steps or adjust_lr_fn"
    if any(p.ndim != 2 for p in group["params"]):
        return "Muon is for matrices, and a parameter of the group is none"
    return _muon(coefficients, int(steps), float(group["eps"]), bool(group["nesterov"]), rate)


@functools.cache
def _muon(
    coefficients: tuple[float, float, float], steps: int, eps: float, ahead: bool, rate: Rule
) -> BaseRules:
    products = Matrices("direction", orthogonalise(coefficients, steps, eps), torch.bfloat16)
    return BaseRules(
        update=(average, nesterov if ahead else plain, products, muon_step),
        scalars=(muon_scalars, rate),
        slots={"momentum_buffer": SIGNED},
    )


register_base(torch.optim.Muon, muon)
