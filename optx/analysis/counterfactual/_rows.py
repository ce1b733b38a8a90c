"""Rows of features: what is given is checked, and how far they are from each other."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError

Norm = Literal["l1", "l2"]


def rows_of(who: str, name: str, given: Any, like: Any) -> Tensor:
    """A tensor (N, ...) of finite floating-point numbers, of a tensor or an array.

    Args:
        who: the function, for messages.
        name: the argument's.
        given: a tensor, or an array, which takes the dtype and device of ``like``.
        like: a tensor, or a model by whose first parameter an array is converted.
    """
    if not isinstance(given, Tensor):
        try:
            array = torch.as_tensor(np.asarray(given, dtype=np.float64))
        except (TypeError, ValueError):
            raise OptxError(
                f"{who}: {name} is a {type(given).__name__}; it must be a tensor or an array of numbers."
            ) from None
        kept = next(like.parameters(), None) if isinstance(like, nn.Module) else like
        given = array.to(kept) if isinstance(kept, Tensor) else array.to(torch.get_default_dtype())
    if not given.is_floating_point():
        raise OptxError(f"{who}: {name} has dtype {given.dtype}; it must be floating-point.")
    if given.ndim < 2 or not given.numel():
        raise ShapeError(
            f"{who}: {name} has shape {tuple(given.shape)}; it must be (rows, features), with at least one "
            "row. Of a single one pass x[None]."
        )
    if not bool(given.isfinite().all()):
        raise OptxError(f"{who}: {name} has numbers that are not finite.")
    # A copy, so that what comes of it shares no storage with what was given, nor its place in a graph.
    return given.detach().clone()


def check_like(who: str, name: str, given: Tensor, x: Tensor) -> None:
    """Raise unless rows have the features of x."""
    if given.shape[1:] != x.shape[1:]:
        raise ShapeError(
            f"{who}: {name} has rows of shape {tuple(given.shape[1:])}; those of x are {tuple(x.shape[1:])}."
        )
    if given.dtype != x.dtype or given.device != x.device:
        raise OptxError(
            f"{who}: {name} is {given.dtype} on {given.device}; x is {x.dtype} on {x.device}. They must be "
            "alike."
        )


def length(v: Tensor, norm: Norm = "l2") -> Tensor:
    """Of each row, (N,), in float64: its squares are sums of many small numbers."""
    each = v.flatten(1).double()
    return each.abs().sum(1) if norm == "l1" else each.square().sum(1).sqrt()


def spread(per_row: Tensor, like: Tensor) -> Tensor:
    """Numbers (N,) as (N, 1, ...), for arithmetic with rows like these."""
    return per_row.to(like.dtype).reshape(-1, *(1 for _ in like.shape[1:]))
