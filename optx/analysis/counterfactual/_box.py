"""Where a counterfactual may lie: a box of its own for each factual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, shown


@dataclass(frozen=True)
class Box:
    """Least and greatest values, row by row: two tensors like x, equal where a feature may not move."""

    low: Tensor
    high: Tensor

    def __getitem__(self, rows: Any) -> Box:
        return Box(self.low[rows], self.high[rows])

    def clamp(self, x: Tensor) -> Tensor:
        """The nearest points in it."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def holds(self, x: Tensor) -> Tensor:
        """Which rows lie in it, (N,)."""
        return ((x >= self.low) & (x <= self.high)).flatten(1).all(1)


def box_of(who: str, x: Tensor, data: Tensor | None, bounds: Any, immutable: Any) -> Box:
    """The box that is asked for, of each row of x.

    Args:
        who: the function, for messages.
        x: factuals.
        data: examples, whose ends are the box where bounds are None; without either there is none.
        bounds: two numbers, or two of a row's shape.
        immutable: numbers of features of the flattened row, or a mask of a row's shape; None: none.

    Raises:
        OptxError: bounds that are none, a row of x outside of them, or features that are not there.
        ShapeError: bounds or a mask of another shape than a row's.
    """
    if bounds is not None:
        low, high = _ends(who, x, bounds)
    elif data is not None:
        # A factual may lie beyond all examples, and is in its own box all the same.
        low, high = torch.minimum(data.amin(0), x), torch.maximum(data.amax(0), x)
    else:
        low, high = torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
    still = _mask(who, x, immutable)
    box = Box(torch.where(still, x, low), torch.where(still, x, high))
    if not bool((inside := box.holds(x)).all()):
        raise OptxError(
            f"{who}: row {int((~inside).nonzero()[0])} of x lies outside of bounds; pass wider ones, or none."
        )
    return box


def _ends(who: str, x: Tensor, bounds: Any) -> tuple[Tensor, Tensor]:
    try:
        low, high = (torch.as_tensor(np.asarray(end, dtype=np.float64)).to(x) for end in _two(bounds))
    except (TypeError, ValueError):
        raise OptxError(
            f"{who}: bounds is {shown(bounds)}; it must be two numbers, or two tensors like one row of x."
        ) from None
    for end in (low, high):
        if end.ndim and end.shape != x.shape[1:]:
            raise ShapeError(
                f"{who}: bounds have shape {tuple(end.shape)}; they must be numbers or like one row of x, "
                f"{tuple(x.shape[1:])}."
            )
    if not bool((low <= high).all()):  # of nan too
        raise OptxError(f"{who}: bounds is {shown(bounds)}; every lower end must be at most the upper one.")
    return low.expand_as(x), high.expand_as(x)


def _two(bounds: Any) -> tuple[Any, Any]:
    low, high = bounds
    return tuple(end.detach().cpu() if isinstance(end, Tensor) else end for end in (low, high))  # type: ignore[return-value]


def _mask(who: str, x: Tensor, immutable: Any) -> Tensor:
    """Which features may not move, like one row."""
    still = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
    if immutable is None:
        return still
    given = (
        immutable.detach().cpu() if isinstance(immutable, Tensor) else torch.as_tensor(np.asarray(immutable))
    )
    if given.dtype == torch.bool:
        if given.shape != still.shape:
            raise ShapeError(
                f"{who}: immutable is a mask of shape {tuple(given.shape)}; it must be like one row of x, "
                f"{tuple(still.shape)}."
            )
        return given.to(x.device)
    whole = not given.numel() or not (given.is_floating_point() or given.is_complex())
    if given.ndim != 1 or not whole or not bool(((given >= 0) & (given < still.numel())).all()):
        raise OptxError(
            f"{who}: immutable is {shown(immutable)}; it must be numbers of features from 0 to "
            f"{still.numel() - 1}, or a bool mask like one row."
        )
    still.view(-1)[given.long().to(x.device)] = True
    return still
