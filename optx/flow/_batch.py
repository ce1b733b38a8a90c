"""What a flow is given with a batch: shapes, masks, weights, dropped conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range, check_whole, shown
from optx.flow._draws import Draws
from optx.flow._network import nulled


def checked_shape(who: str, shape: Any) -> tuple[int, int]:
    """The two whole numbers, or an error."""
    try:
        rows, length = shape
    except (TypeError, ValueError):
        raise ShapeError(f"{who}: shape is {shape!r:.60}; it must be (batch, length).") from None
    return check_whole(who, "shape", rows, 0), check_whole(who, "shape", length, 0)


def checked_mask(who: str, name: str, mask: Any, shape: Sequence[int]) -> Tensor:
    """A bool tensor of that shape, or an error."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"{who}: {name} is {got}; it must be a bool tensor of shape {tuple(shape)}.")
    return mask


def dropped(who: str, condition: Tensor | None, chance: float, null: Any, draws: Draws) -> Tensor | None:
    """The condition with some rows' taken away; nothing is drawn where none can be."""
    check_range(who, "drop_condition", chance, 0, 1)
    if chance == 0:
        return condition
    if condition is None or null is None:
        raise OptxError(f"{who}: drop_condition is {chance}; it needs condition=, and null= in its place.")
    gone = draws.uniform(len(condition)) < chance
    gone = gone.to(condition.device).reshape(-1, *(1,) * (condition.ndim - 1))
    return torch.where(gone, nulled(who, condition, null), condition)


def reduced(who: str, losses: Tensor, counts: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The mean over what counts, weighted; the sum; or each position's."""
    share = counts.to(losses.dtype)
    if weights is not None:
        if not isinstance(weights, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"{who}: weights is a {type(weights).__name__}; it must be a tensor.")
        if weights.device.type == "cpu" and not bool((weights >= 0).all()):  # nan too
            raise OptxError(f"{who}: weights has {shown(weights.min().item())}; they must be at least 0.")
        wide = weights.to(losses)
        if wide.shape != counts.shape and wide.shape != counts.shape[:1]:
            raise ShapeError(
                f"{who}: weights has shape {tuple(wide.shape)}; it must have one for each of the rows, "
                f"{tuple(counts.shape[:1])}, or positions, {tuple(counts.shape)}."
            )
        share = share * (wide[:, None] if wide.ndim == 1 else wide)
    losses = losses * share
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / share.sum()
