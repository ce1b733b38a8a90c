"""Between which slopes an activation lies that `optx.LDLT` serves: modules, functions and names."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from optx._errors import OptxError, shown
from optx.inject._conv_trace import Op
from optx.lipschitz._slopes import slopes_of

Slopes = tuple[float, float]

# Elementwise, by the name that functions and (in lower case) modules have.
_SERVED: dict[str, type[nn.Module]] = {
    **{"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "leakyrelu": nn.LeakyReLU},
    **{"elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU, "softplus": nn.Softplus, "sigmoid": nn.Sigmoid},
    **{"tanh": nn.Tanh, "tanhshrink": nn.Tanhshrink, "softshrink": nn.Softshrink, "softsign": nn.Softsign},
    **{"hardtanh": nn.Hardtanh, "logsigmoid": nn.LogSigmoid, "hardsigmoid": nn.Hardsigmoid},
}
BEYOND: dict[str, Slopes] = {
    "gelu": (-0.13, 1.13),
    "silu": (-0.1, 1.1),
    "hardswish": (-0.5, 1.5),
}
"""Whose slopes leave [0, 1] on both sides, rounded outwards: served where a person says so."""


def named(activation: Any) -> Slopes:
    """The slopes of what ``LDLT(activation=...)`` says.

    Raises:
        OptxError: a name that is not known, or no two numbers in order.
    """
    if isinstance(activation, str):
        name = activation.lower()
        if name in _SERVED:
            return slopes_of(_SERVED[name]())
        beyond = f" Give its slopes: activation={BEYOND[name]}." if name in BEYOND else ""
        raise OptxError(
            f"LDLT: activation is {activation!r}; it must be one of "
            f"{', '.join(sorted(_SERVED))}, or "
            f"the least and the greatest slope, as (0.01, 1.0).{beyond}"
        )
    try:
        low, high = (float(one) for one in activation)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (-math.inf < low < high < math.inf):
        raise OptxError(
            f"LDLT: activation is {shown(activation)}; it must be a name, as 'relu', or the least and the "
            "greatest slope of an elementwise function, as (0.01, 1.0)."
        )
    return low, high


def of(op: Op) -> Slopes | None:
    """An operation's, if it is an elementwise function that is known, those beyond [0, 1] too.

    Raises:
        OptxError: it is known, and has none with its options.
    """
    name = op.path.rstrip("_") if op.module is None else type(op.module).__name__.lower()
    if op.module is not None and type(op.module).__module__ != nn.ReLU.__module__:
        return None
    if name in BEYOND:
        return BEYOND[name]
    if name not in _SERVED:
        return None
    module = _as_module(op, _SERVED[name]) if op.module is None else op.module
    return None if module is None else slopes_of(module)


def _as_module(op: Op, kind: type[nn.Module]) -> nn.Module | None:
    """A function as the module of its name, which takes the same options; None: some are computed."""
    rest: Any = getattr(op.call, "rest", ())
    options = {name: value for name, value in op.options.items() if name != "input"}
    plain = all(isinstance(value, int | float) for value in (*rest, *options.values()))
    return kind(*rest, **options) if plain and len(op.inputs) == 1 else None


def product(one: Slopes, other: Slopes) -> Slopes:
    """Of one function after another."""
    ends = [a * b for a in one for b in other]
    return min(ends), max(ends)


def within(one: Slopes, other: Slopes) -> bool:
    """Whether one range lies in another."""
    return other[0] <= one[0] and one[1] <= other[1]
