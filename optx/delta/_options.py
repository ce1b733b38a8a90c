"""Options that several methods take: their types, and how they are read and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from optx._errors import OptxError

PerModel = float | Sequence[float]
"""A number for all models or one for each."""
Convention = Literal["paper", "mergekit"]
"""Whose result: that of the paper's authors' code, or mergekit's where it differs."""
Scope = Literal["global", "tensor"]
"""What entries are ranked within: the whole model, or each tensor."""
CONVENTIONS, SCOPES = get_args(Convention), get_args(Scope)


def per_model(owner: str, argument: str, value: PerModel, models: int, what: str = "models") -> list[float]:
    """One number for each model.

    Raises:
        OptxError: as many numbers as there are no models.
    """
    if isinstance(value, int | float):
        return [float(value)] * models
    if len(value) != models:
        raise OptxError(
            f"{owner}: {argument} has {len(value)} numbers, and there are {models} {what}. Give one for "
            "each, or one for all."
        )
    return [float(one) for one in value]


def finite_number(owner: str, argument: str, value: object) -> float:
    """A number that a change can be multiplied by.

    Raises:
        OptxError: it is none, or not finite.
    """
    try:
        if not isinstance(value, str) and math.isfinite(found := float(value)):  # type: ignore[arg-type]
            return found
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise OptxError(f"{owner}: {argument} is {value!r}; it must be a finite number.")


def numbers(value: PerModel) -> Sequence[float]:
    """A number for all or one for each, as a sequence."""
    return (value,) if isinstance(value, int | float) else value
