"""Between which slopes an activation lies: modules, functions and names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from optx._errors import OptxError, shown
from optx.inject._conv_trace import Op

Slopes = tuple[float, float]

_UNIT: Slopes = (0.0, 1.0)
_SELU = 1.0507009873554805 * 1.6732632423543772  # scale times alpha, the slope just below 0

# Elementwise, by the name that functions and (in lower case) modules have; options are those of the module.
_PLAIN: dict[str, Slopes] = {
    **dict.fromkeys(("relu", "relu6", "tanh", "softplus", "hardtanh", "softsign"), _UNIT),
    **dict.fromkeys(("logsigmoid", "tanhshrink", "softshrink"), _UNIT),
    "sigmoid": (0.0, 0.25),
    "hardsigmoid": (0.0, 1.0 / 6.0),
    "selu": (0.0, _SELU),
}
_OPTIONED: dict[str, tuple[str, float, Callable[[float], Slopes]]] = {
    "leaky_relu": ("negative_slope", 0.01, lambda slope: (min(slope, 1.0), max(slope, 1.0))),
    "leakyrelu": ("negative_slope", 0.01, lambda slope: (min(slope, 1.0), max(slope, 1.0))),
    "elu": ("alpha", 1.0, lambda alpha: (min(alpha, 0.0), max(alpha, 1.0))),
    "celu": ("alpha", 1.0, lambda alpha: _UNIT),
}
BEYOND: dict[str, Slopes] = {
    "gelu": (-0.13, 1.13),
    "silu": (-0.1, 1.1),
    "hardswish": (-0.5, 1.5),
}
"""Whose slopes leave [0, 1] on both sides: served where a person says so."""


def named(activation: Any) -> Slopes:
    """The slopes of what ``LDLT(activation=...)`` says.

    Raises:
        OptxError: a name that is not known, or no two numbers in order.
    """
    if isinstance(activation, str):
        name = activation.lower()
        if name in _PLAIN:
            return _PLAIN[name]
        if name in _OPTIONED:
            _, usual, slopes = _OPTIONED[name]
            return slopes(usual)
        beyond = f" Give its slopes: activation={BEYOND[name]}." if name in BEYOND else ""
        raise OptxError(
            f"LDLT: activation is {activation!r}; it must be one of "
            f"{', '.join(sorted(_PLAIN | _OPTIONED))}, or "
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
    """An operation's, if it is an elementwise function that is known, those beyond [0, 1] too."""
    name = op.path.rstrip("_") if op.module is None else type(op.module).__name__.lower()
    if op.module is not None and type(op.module).__module__ != nn.ReLU.__module__:
        return None
    known = {**_PLAIN, **BEYOND}
    if name in known:
        return known[name]
    if name not in _OPTIONED:
        return None
    option, usual, slopes = _OPTIONED[name]
    given: Any = usual
    if op.module is not None:
        given = getattr(op.module, option)
    elif option in op.options:
        given = op.options[option]
    elif rest := getattr(op.call, "rest", ()):
        given = rest[0]
    return slopes(float(given)) if isinstance(given, int | float) else None


def product(one: Slopes, other: Slopes) -> Slopes:
    """Of one function after another."""
    ends = [a * b for a in one for b in other]
    return min(ends), max(ends)


def within(one: Slopes, other: Slopes) -> bool:
    """Whether one range lies in another."""
    return other[0] <= one[0] and one[1] <= other[1]
