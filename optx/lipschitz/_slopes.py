"""The slopes of elementwise activations: between which numbers each one's difference quotients lie.

The one table of them: `optx.LDLT` makes weights for these, `optx.analysis.lipschitz` bounds networks by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from optx._errors import OptxError

Pair = tuple[float, float]

# Rounded outwards; each is tried on a fine grid in tests/analysis/test_slopes.py.
_SILU = (-0.09983933, 1.09983933)
_GELU = {"none": (-0.12890415, 1.12890415), "tanh": (-0.12899307, 1.12899307)}
_MISH = (-0.11252613, 1.08849817)
_SELU = 1.7580993408473766 + 1e-12  # its scale times its alpha


def _softplus(module: Any) -> Pair:
    if module.threshold < 20:  # it jumps there, by log(1 + exp(-threshold)) / beta
        raise OptxError(
            f"Softplus has threshold={module.threshold:g}, where it jumps; with the default, 20, it jumps "
            "by 2e-9."
        )
    return (0.0, 1.0)


def _rrelu(module: Any) -> Pair:
    if module.training:
        raise OptxError("RReLU draws its slopes in training mode; call model.eval().")
    slope = (module.lower + module.upper) / 2
    return (min(slope, 1.0), max(slope, 1.0))


SLOPES: dict[type[nn.Module], Callable[[Any], Pair]] = {
    nn.ReLU: lambda _: (0.0, 1.0),
    nn.ReLU6: lambda _: (0.0, 1.0),
    nn.LeakyReLU: lambda m: (min(m.negative_slope, 1.0), max(m.negative_slope, 1.0)),
    nn.RReLU: _rrelu,
    nn.Hardtanh: lambda _: (0.0, 1.0),
    nn.Tanh: lambda _: (0.0, 1.0),
    nn.Tanhshrink: lambda _: (0.0, 1.0),
    nn.Softshrink: lambda _: (0.0, 1.0),
    nn.Softsign: lambda _: (0.0, 1.0),
    nn.Sigmoid: lambda _: (0.0, 0.25),
    nn.LogSigmoid: lambda _: (0.0, 1.0),
    nn.Hardsigmoid: lambda _: (0.0, 1 / 6),
    nn.Softplus: _softplus,
    nn.ELU: lambda m: (min(m.alpha, 0.0), max(m.alpha, 1.0)),
    nn.CELU: lambda m: (0.0, 1.0) if m.alpha > 0 else (math.nan, math.nan),
    nn.SELU: lambda _: (0.0, _SELU),
    nn.SiLU: lambda _: _SILU,
    nn.GELU: lambda m: _GELU[m.approximate],
    nn.Mish: lambda _: _MISH,
    nn.Hardswish: lambda _: (-0.5, 1.5),
}

# Calls that are an activation; what they are given besides is what the module's constructor takes.
FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **{torch.relu: nn.ReLU, torch.tanh: nn.Tanh, torch.sigmoid: nn.Sigmoid},
    **{"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid},
    **{F.relu: nn.ReLU, F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.hardtanh: nn.Hardtanh},
    **{F.tanh: nn.Tanh, F.tanhshrink: nn.Tanhshrink, F.softshrink: nn.Softshrink, F.softsign: nn.Softsign},
    **{F.sigmoid: nn.Sigmoid, F.logsigmoid: nn.LogSigmoid, F.hardsigmoid: nn.Hardsigmoid},
    **{F.softplus: nn.Softplus, F.elu: nn.ELU, F.celu: nn.CELU, F.selu: nn.SELU, F.silu: nn.SiLU},
    **{F.gelu: nn.GELU, F.mish: nn.Mish, F.hardswish: nn.Hardswish},
    "relu_": lambda: nn.ReLU(inplace=True),
    torch.relu_: lambda: nn.ReLU(inplace=True),
    torch.abs: lambda: Absolute(),
    "abs": lambda: Absolute(),
}


class Absolute(nn.Module):
    """|x|, which torch has as a function only."""


SLOPES[Absolute] = lambda _: (-1.0, 1.0)


def own_type(module: nn.Module, kinds: Any) -> type[nn.Module] | None:
    """Which of some classes a module computes as: it is one, or inherits its forward; None if none."""
    forward = type(module).forward
    return next((one for one in type(module).__mro__ if one in kinds and one.forward is forward), None)


def slopes_of(module: nn.Module) -> Pair:
    """The least and the greatest slope of an activation in ``SLOPES``.

    Raises:
        OptxError: with its options, or in its mode, it has none.
    """
    kind = own_type(module, SLOPES)
    if kind is None:
        raise OptxError(f"{type(module).__name__} has no quadratic constraint")
    low, high = map(float, SLOPES[kind](module))
    if not -math.inf < low <= high < math.inf:
        raise OptxError(f"{type(module).__name__} has slopes that are no interval of finite numbers")
    return low, high
