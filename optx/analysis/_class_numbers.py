"""Samples with the number of their class: what does not fit is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError


def check_samples(who: str, what: str, values: Tensor, target: Tensor, one: bool = False) -> int:
    """The dimension of the classes; raise unless each sample has a floating number for each, and its own.

    Args:
        who: the function, for messages.
        what: the values' name.
        values: a number of each class, for each sample.
        target: class numbers.
        one: whether a single sample may come without a dimension of its own.

    Raises:
        ShapeError: target does not fit the values.
        OptxError: the values are not floating, or target is not of an integer dtype.
    """
    class_dim = 0 if values.ndim == 1 else 1
    if not values.is_floating_point() or values.ndim < 2 - one or values.shape[class_dim] == 0:
        raise OptxError(
            f"{who}: {what} have shape {tuple(values.shape)} and dtype {values.dtype}; they must be "
            f"floating, of shape {'(C,), ' if one else ''}(N, C) or (N, C, d1, ...), with at least one class."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise OptxError(
            f"{who}: target has dtype {target.dtype}; it must hold class numbers, of an integer dtype."
        )
    wanted = values.shape[:class_dim] + values.shape[class_dim + 1 :]
    if target.shape != wanted:
        raise ShapeError(
            f"{who}: target has shape {tuple(target.shape)}; for {what} of shape {tuple(values.shape)} it "
            f"must be {tuple(wanted)}."
        )
    return class_dim


def check_classes(who: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for a class number out of range.

    Args:
        who: the function, for messages.
        labels: of the samples that count.
        classes: how many there are.
        ignore_index: the number of samples that do not count.

    Raises:
        IndexError: says which numbers there are.
    """
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise IndexError(
            f"{who}: target has class numbers from {int(labels.min())} to {int(labels.max())}; with "
            f"{classes} classes they must be in 0..{classes - 1}, or ignore_index={ignore_index}."
        )
