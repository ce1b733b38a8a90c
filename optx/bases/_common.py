"""What the rules of several optimizers have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optx._rules import rule
from optx.step.transform import Group, Slot

SIGNED = Slot(dtype=None, moment="signed")
SQUARES = Slot(dtype=None, moment="nonnegative")


@rule(writes="g")
def negate(g: Any) -> Any:
    """``maximize=True``."""
    return -g


@rule(writes="g")
def add_l2(g: Any, w: Any, weight_decay: Any) -> Any:
    """Weight decay coupled with the gradient (SGD, Adam)."""
    return g + weight_decay * w


@rule(writes="w")
def shrink(w: Any, keep: Any) -> Any:
    """Weight decay decoupled from the gradient (AdamW)."""
    return w * keep


def given(group: Group, key: str) -> bool:
    """Whether a number of a group does anything; torch leaves decay out at 0, where 0 * inf would be nan."""
    value = group[key]
    return isinstance(value, Tensor) or bool(value != 0)
