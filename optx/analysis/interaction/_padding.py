"""Which positions of a batch are padding, and what looks as if it should have told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optx._errors import warn


def mask_of(owner: str, inputs: Any) -> Tensor | None:
    """Which positions are no padding, (B, T) bool; None: all of them."""
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None  # pyright: ignore
    if not isinstance(found, Tensor):
        return None
    if found.ndim != 2:
        warn(
            f"{owner}: attention_mask has shape {tuple(found.shape)}; padding is told by one of (batch, "
            "positions) alone, and with this one all positions count."
        )
        return None
    return None if bool(found.bool().all()) else found.bool()


def warn_of_a_mask(owner: str, inputs: Any, second: Any) -> None:
    """Say that of a pair the second tensor, which looks like an attention mask, is taken for a target."""
    if isinstance(inputs, Tensor) and isinstance(second, Tensor) and _is_like_a_mask(inputs, second):
        warn(
            f"{owner}: a batch is a pair whose second tensor looks like an attention mask. It is taken for a "
            "target: the model runs without it, and padding counts. Give a mapping, "
            '{"input_ids": ..., "attention_mask": ...}.'
        )


def _is_like_a_mask(inputs: Tensor, second: Tensor) -> bool:
    """Whether each row is ones with zeros on one side, if any, for integers of the same shape."""
    if inputs.is_floating_point() or second.is_floating_point() or second.is_complex():
        return False
    if inputs.ndim != 2 or second.shape != inputs.shape or not second.numel():
        return False
    on = second != 0
    if bool((on & (second != 1)).any()) or bool(on.all()):
        return False
    steps = on.long().diff(dim=1)
    one_side = (steps <= 0).all(1) | (steps >= 0).all(1)
    return bool((one_side & on.any(1)).all())
