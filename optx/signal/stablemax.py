"""StableMax cross-entropy: a loss whose gradient does not vanish once the training set is learnt.

Source: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
arXiv 2501.04697, section 4.1 (definition 4, proposition 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_range
from optx.kernels.available import why_unavailable
from optx.kernels.loss import stablemax_rows as torch_rows
from optx.kernels.loss.stablemax_rows import Options, RowSums, math_dtype
from optx.signal._class_rows import as_rows, check_labels, check_logits, check_reduction

__all__ = ["StableMaxCrossEntropy", "stablemax_cross_entropy"]

_OWNER = "stablemax_cross_entropy"


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with StableMax in the place of softmax.

    Softmax's exponential makes the other classes' terms vanish beside the true one's (in float32 once the
    other logits are 16.6 below): the loss and its gradient become exactly 0. StableMax divides
    s(z) = z + 1 (z >= 0), 1 / (1 - z) (z < 0) by its sum over the classes, so the ratio of two terms grows
    with the logits, not with their exponential (arXiv 2501.04697, definition 4). The loss of a sample is
    -log(s(z_y) / sum_k s(z_k)), which equals ``cross_entropy(sign(z) * log1p(|z|), y)`` (proposition 1).

    Unlike softmax it depends on where logits lie, not only on their differences: a constant added to
    all logits changes the loss. The order of the classes, hence accuracy, is softmax's.

    Arguments, shapes and reductions are those of `torch.nn.functional.cross_entropy`. Mathematics is in
    float32 (float64 for float64 logits) whatever the logits' dtype, and only the logits and one number per
    row are kept for the backward pass. On CPU and CUDA/ROCm both passes are one compiled kernel
    (Numba, Triton); elsewhere, for tensor subclasses and under ``torch.compile`` they are torch operations.
    A second derivative, and gradients of class probabilities or of ``weight``, are computed by
    differentiable torch operations, which keep several tensors of the logits' size.

    Args:
        logits: unnormalised scores, shape (C,), (N, C) or (N, C, d1, ...); float16, bfloat16, float32 or
            float64.
        target: class numbers in [0, C), any integer dtype, shape (), (N,) or (N, d1, ...); or class
            probabilities, floating, in the logits' shape.
        weight: weight of each class, shape (C,).
        ignore_index: samples with this class number count for nothing; class numbers only.
        reduction: ``"mean"`` (over the weights of the samples that count; for probabilities over N d1 ...),
            ``"sum"`` or ``"none"``.
        label_smoothing: share of each target that is spread evenly over the classes, in [0, 1].

    Returns:
        The loss, in nats: a scalar, or the target's shape (without the class dimension) for ``"none"``.
        Its dtype is the logits', or float32 inside autocast. A mean over no sample is nan, as in torch.

    Raises:
        ShapeError: target or weight do not fit the logits.
        OptxError: an option out of range.
        TypeError: a dtype that can't be used.
        IndexError: a class number out of range, found on CPU; on a GPU it is a device-side assertion.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
        >>> loss = stablemax_cross_entropy(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> round(loss.item(), 6), logits.grad
        (0.405465, tensor([[-0.1111,  0.0556,  0.2222]]))
    """
    _check(logits, target, weight, ignore_index, reduction, label_smoothing)
    if weight is not None:
        weight = weight.to(math_dtype(logits.dtype)).contiguous()
    rows, row_target, shape = as_rows(logits, target)
    check_labels(_OWNER, row_target, ignore_index, rows.shape[1])
    options = Options(weight, ignore_index, float(label_smoothing))
    loss = _row_losses(rows, row_target, options)
    if reduction == "none":
        loss = loss.reshape(shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / _divisor(row_target, options)
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


class StableMaxCrossEntropy(nn.Module):
    """Cross-entropy whose softmax grows linearly and collapses late; for `torch.nn.CrossEntropyLoss`.

    The loss of a sample is -log(s(z_y) / sum_k s(z_k)), with s(z) = z + 1 where z >= 0 and 1 / (1 - z) below.
    Logits and target have the shapes that torch's loss takes, class probabilities included.

    Args:
        weight: weight of each class, shape (C,); kept as a buffer.
        ignore_index: samples with this class number count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: share of each target that is spread evenly over the classes, in [0, 1].

    Paper values:
        The loss has no number of its own. Modular addition, an MLP: AdamW, lr 0.01, betas (0.9, 0.999), no
        weight decay, 80,000 to 100,000 epochs.

    Limits: It changes when adding a number to all logits, which softmax does not: a model trained on
    cross-entropy starts from other probabilities.

    Keywords: StableMax, grokking, overfitting, softmax collapse, numerical stability.

    Evidence: ``optx run grokking``; ``test_stablemax.py``.

    Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, definition 4 and proposition 1.

    Raises:
        OptxError: an option out of range.

    Example:
        >>> import torch, optx
        >>> criterion = optx.StableMaxCrossEntropy(label_smoothing=0.1)
        >>> criterion(torch.zeros(4, 10), torch.arange(4))  # log 10
        tensor(2.3026)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_options(reduction, label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss; see `stablemax_cross_entropy`."""
        return stablemax_cross_entropy(
            logits, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        options = (
            ("ignore_index", self.ignore_index, -100),
            ("reduction", self.reduction, "mean"),
            ("label_smoothing", self.label_smoothing, 0.0),
        )
        shown = [f"{name}={value!r}" for name, value, default in options if value != default]
        return ", ".join(["weighted"] * (self.weight is not None) + shown)


class _Path(NamedTuple):
    """The two functions of `_stablemax_rows`, whoever computes them."""

    forward: Callable[[Tensor, Tensor, Options], RowSums]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Options], Tensor]


_TORCH = _Path(torch_rows.chunked_forward, torch_rows.chunked_backward)


def _path(logits: Tensor) -> _Path:
    """Who computes: a compiled kernel for plain tensors on CPU and CUDA/ROCm, torch operations else."""
    if type(logits) not in (Tensor, nn.Parameter):
        return _TORCH
    if logits.is_cuda and why_unavailable("triton") is None:
        from optx.kernels.loss import stablemax_triton

        return _Path(stablemax_triton.forward, stablemax_triton.backward)
    if logits.device.type == "cpu" and why_unavailable("numba") is None:
        from optx.kernels.loss import stablemax_cpu

        return _Path(stablemax_cpu.forward, stablemax_cpu.backward)
    return _TORCH


class _RowLoss(torch.autograd.Function):
    """Rows of logits to rows of loss, keeping the logits and one or two numbers per row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: Options) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        sums = _path(logits).forward(logits, target, options)
        ctx.save_for_backward(logits, target, options.weight, sums.rest, sums.mass)
        ctx.options = options._replace(weight=None)
        return sums.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, target, weight, rest, mass = ctx.saved_tensors
        options: Options = ctx.options._replace(weight=weight)
        if torch.is_grad_enabled():  # create_graph=True: the result is to be differentiated again
            loss = _by_operations(logits, target, options)
            result = cast(Tensor, torch.autograd.grad(loss, logits, grad, create_graph=True)[0])
        else:
            result = _path(logits).backward(grad, logits, target, rest, mass, options)
        return result, None, None


def _row_losses(logits: Tensor, target: Tensor, options: Options) -> Tensor:
    others = (target, options.weight)
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others)
    if tracked or torch.compiler.is_compiling():  # the compiler derives and fuses its own backward pass
        return _by_operations(logits, target, options)
    return cast(Tensor, _RowLoss.apply(logits, target, options))  # pyright: ignore[reportUnknownMemberType]


def _by_operations(logits: Tensor, target: Tensor, options: Options) -> Tensor:
    """By differentiable ones; what is ignored has a gradient of 0 also where it is nan."""
    if not target.is_floating_point():
        logits = logits.masked_fill((target == options.ignore_index)[:, None], 0)
    return torch_rows.forward(logits, target, options).loss


def _divisor(target: Tensor, options: Options) -> Tensor | float:
    """What the mean divides by: the number of rows, or the weights of the labels that count."""
    if target.is_floating_point():
        return target.shape[0] or float("nan")
    counts = target != options.ignore_index
    if options.weight is None:
        return counts.sum()
    return torch.where(counts, options.weight[target.where(counts, 0)], 0.0).sum()


def _check_options(reduction: str, label_smoothing: float) -> None:
    check_reduction(_OWNER, reduction)
    check_range(_OWNER, "label_smoothing", label_smoothing, 0.0, 1.0)


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    _check_options(reduction, label_smoothing)
    classes = check_logits(_OWNER, logits, target, weight=weight)
    soft = target.is_floating_point()
    if soft and ignore_index >= 0:
        raise OptxError(
            f"{_OWNER}: ignore_index is {ignore_index}, but target holds class probabilities, of which none "
            "can be ignored; give such a sample probabilities of 0 instead."
        )
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        raise ShapeError(
            f"{_OWNER}: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; it must be a "
            f"floating tensor of shape ({classes},), one number per class."
        )
