"""Logits and class numbers as `torch.nn.functional.cross_entropy` takes them: checked, and as rows."""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, wanted_shape

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")


def check_reduction(owner: str, reduction: str) -> None:
    """Raise unless there is such a reduction."""
    if reduction not in _REDUCTIONS:
        raise OptxError(f"{owner}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'.")


def check_logits(owner: str, logits: Tensor, target: Tensor, **others: Tensor | None) -> int:
    """Raise unless dtypes, devices and shapes are those of a classification.

    Args:
        owner: the loss, for errors.
        logits: (C,), (N, C) or (N, C, d1, ...).
        target: class numbers, or class probabilities.
        **others: more tensors that must be where the logits are.

    Returns:
        How many classes there are.

    Raises:
        TypeError: a dtype that can't be used.
        ShapeError: the target does not fit the logits, or there is no class.
        OptxError: tensors on two devices.
    """
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"{owner}: logits have dtype {logits.dtype}; use float16, bfloat16, float32 or float64."
        )
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"{owner}: target has dtype {target.dtype}; use an integer dtype for class numbers or a "
            "floating one for class probabilities."
        )
    for name, tensor in {"target": target, **others}.items():
        if tensor is not None and tensor.device != logits.device:
            raise OptxError(
                f"{owner}: {name} is on {tensor.device} and logits are on {logits.device}; move {name} there."
            )
    if logits.ndim == 0:
        raise ShapeError(f"{owner}: logits is a scalar; it must have shape (C,), (N, C) or (N, C, d1, ...).")
    class_dim = 0 if logits.ndim == 1 else 1
    classes = logits.shape[class_dim]
    if classes == 0:
        raise ShapeError(
            f"{owner}: logits of shape {tuple(logits.shape)} have no class (dimension {class_dim})."
        )
    soft = target.is_floating_point()
    wanted = logits.shape if soft else logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if target.shape != wanted:
        kind = "class probabilities" if soft else "class numbers"
        raise ShapeError(
            f"{owner}: target ({kind}) has shape {tuple(target.shape)}; "
            f"{wanted_shape(logits.shape, target.shape, wanted)}"
        )
    return classes


def as_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Logits as (R, C), targets as (R,) or (R, C), each last stride 1, and the loss's own shape.

    Dimensions behind the class dimension cost a transposed copy, which is then what backward keeps:
    as much as `cross_entropy` keeps.
    """

    def matrix(t: Tensor) -> Tensor:
        t = t.movedim(0 if t.ndim == 1 else 1, -1)
        flat = t.reshape(-1, t.shape[-1])
        return flat if flat.stride(1) == 1 else flat.contiguous()

    shape = logits.movedim(0 if logits.ndim == 1 else 1, -1).shape[:-1]
    if target.is_floating_point():
        return matrix(logits), matrix(target), shape
    return matrix(logits), target.reshape(-1).to(torch.int64).contiguous(), shape


def check_labels(owner: str, target: Tensor, ignore_index: int, classes: int) -> None:
    """Raise for a class number out of range, where looking at the numbers does not stop a device.

    Args:
        owner: the loss, for the error.
        target: (R,); class probabilities are not looked at.
        ignore_index: the number that counts for nothing.
        classes: how many there are.

    Raises:
        IndexError: names the first.
    """
    if target.is_floating_point() or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if type(target) is not Tensor:  # a fake or wrapped tensor: it may have no numbers to look at
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{owner}: target {int(target[row])} (sample {row} of {len(target)}) is out of range for "
            f"{classes} classes; it must be in 0..{classes - 1}, or ignore_index={ignore_index}."
        )
