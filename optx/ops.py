"""The mathematics a rule may use, besides ``+ - * / % **`` and comparisons.

These are ``abs, exp, fast_power, log, maximum, minimum, sign, sqrt`` and ``where(condition, a, b)``. A rule
is one plain function that three compilers read, and each name here means the same in all three: on torch
tensors it is what stands below; in generated Triton and Numba code it is the compiler's own.

    >>> import torch, optx
    >>> from optx.ops import sign
    >>> @optx.rule(writes="w")
    ... def pull_l1(w, anchor, rate):
    ...     return w - rate * sign(w - anchor)
    >>> pull_l1(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 0.5)
    tensor([1.0000, 1.5000])
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["abs", "exp", "fast_power", "log", "maximum", "minimum", "sign", "sqrt", "where"]


class Several:
    """Many tensors in the place of one, as rules are called on where launches cost more than memory."""

    def where_(self, a: Any, b: Any) -> Any:
        """``a`` where this (boolean) one holds, else ``b``."""
        raise NotImplementedError


def sqrt(x: Any) -> Any:
    """Square root."""
    return x.sqrt() if hasattr(x, "sqrt") else _as_ieee(math.sqrt, x, math.nan)


def exp(x: Any) -> Any:
    """Natural exponential."""
    return x.exp() if hasattr(x, "exp") else _as_ieee(math.exp, x, math.inf)


def log(x: Any) -> Any:
    """Natural logarithm."""
    return x.log() if hasattr(x, "log") else _as_ieee(math.log, x, -math.inf if x == 0 else math.nan)


def fast_power(x: Any, exponent: Any) -> Any:
    """``x`` to the ``exponent``, where ``x`` is above 0.

    In float32 kernels it costs a fraction of ``**`` (on a CPU a tenth), with a relative error of 3e-7 (1 +
    abs(exponent * log2(x))) at most, and powers below 1e-37 or above 1e38 are about that.
    """
    return x**exponent


def abs(x: Any) -> Any:
    """Absolute value."""
    return builtins.abs(x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; sign(0) is 0."""
    return x.sign() if hasattr(x, "sign") else (x > 0) - (x < 0)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where ``condition`` holds, else ``b``; both are evaluated."""
    if isinstance(condition, Several):
        return condition.where_(a, b)
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def maximum(a: Any, b: Any) -> Any:
    """The larger of two; NaN handling is the compiler's."""
    return where(a > b, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two; NaN handling is the compiler's."""
    return where(a < b, a, b)


def _as_ieee(function: Callable[[float], float], x: float, outside: float) -> float:
    """A function of ``math``, which raises where tensors and kernels give inf or nan."""
    try:
        return function(x)
    except (ValueError, OverflowError):
        return outside
