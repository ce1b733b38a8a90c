"""Rules as a user writes them, in a module of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import optx
from optx.ops import abs as magnitude
from optx.ops import exp, log, maximum, minimum, sign, sqrt, where

LIMIT = 0.5
SHARP = 3


@optx.rule(writes="g")
def soft_sign(g: Any, limit: Any) -> Any:
    return g / (1.0 + optx.ops.abs(g) / limit)


class SoftClip(optx.Transform):
    """The example in the documentation of `optx.Transform`."""

    name = "soft_clip"
    rules: ClassVar = {"gradient": soft_sign}

    def __init__(self, limit: float = 1.0) -> None:
        self.options = {"limit": limit}


@optx.rule(writes="x")
def clamp(x: Any, limit: Any) -> Any:
    """A helper."""
    return maximum(minimum(x, limit), -limit)


@optx.rule(writes=("g", "trace"))
def everything(w: Any, g: Any, trace: Any, norm: Any, limit: Any, lr: Any) -> Any:
    """Every function of optx.ops, a helper rule, constants, a slot, a sum and an option."""
    bent = sign(g) * log(1.0 + magnitude(g) * SHARP)
    damped = where(magnitude(w) > LIMIT, bent * exp(-magnitude(w)), sqrt(magnitude(bent)) * lr)
    trace = 0.5 * trace + clamp(damped, limit) / (1.0 + norm) ** 2
    return trace + g, trace


@optx.rule(writes="total")
def squares(g: Any) -> Any:
    return g * g


@optx.rule(writes="norm")
def root(total: Any) -> Any:
    return sqrt(total)


class Everything(optx.Transform):
    """A chain of moments with a reduction and a slot."""

    name = "everything"
    slots: ClassVar = {"trace": optx.like_weight(None)}
    options: ClassVar = {"limit": 0.25}
    rules: ClassVar = {"sums": squares, "scalars": root, "gradient": everything}
