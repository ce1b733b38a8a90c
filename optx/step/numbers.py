"""Numbers as torch's optimizers take them: Python's, NumPy's, decimals, tensors of one element."""

from __future__ import annotations

from numbers import Number
from typing import Any

from torch import Tensor


def as_number(value: Any) -> float | Tensor | None:
    """A number to compute with; None if the value is none."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Tensor):
        return value if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, Number) or getattr(value, "shape", None) == ():
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
    return None


def as_float(value: Any) -> float | None:
    """The same as a plain float, read from the device if need be."""
    number = as_number(value)
    if isinstance(number, Tensor):
        return float(number.detach())
    return None if number is None else float(number)
