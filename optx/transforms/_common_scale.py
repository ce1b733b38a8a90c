"""Rules of transforms that scale all gradients by one factor, of their common norm."""

from __future__ import annotations

from typing import Any

from optx._rules import rule


@rule(writes="square")
def square_of(grad_sq: Any) -> Any:
    """Totalled: the squared norm of the gradient as it stands."""
    return grad_sq * 1.0


@rule(writes="g")
def scaled(g: Any, scale: Any) -> Any:
    """All gradients by one factor."""
    return g * scale
