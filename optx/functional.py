"""Functions beside torch's own: softmax of long rows, which it reads twice and writes once, attention by
softplus (`optx.LSSA`, `optx.LSSAR`), and what policy gradients are made of (`optx.SofTGRPO`).

Every exponential is a mantissa and an exponent of its own, which are added without multiplying them out: no
row overflows, and its largest entry need not be known before. Source: "The Two-Pass Softmax Algorithm", arXiv
2001.04438.

    >>> import torch, optx
    >>> x = torch.tensor([1000.0, 1001.0, 1002.0])
    >>> optx.functional.softmax2(x)
    tensor([0.0900, 0.2447, 0.6652])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from optx import _softmax_rows as rows
from optx._errors import OptxError, ShapeError, check_choice, check_range, wanted_shape
from optx._policy_loss import grpo_advantage as grpo_advantage
from optx._policy_loss import k3_divergence as k3_divergence
from optx._policy_loss import ppo_clip_loss as ppo_clip_loss
from optx._soft_density import soft_logprob as soft_logprob
from optx._softplus_attention import lssa_attention as lssa_attention
from optx._softplus_attention import lssar_attention as lssar_attention

__all__ = [
    "cross_entropy2",
    "grpo_advantage",
    "k3_divergence",
    "logsumexp2",
    "lssa_attention",
    "lssar_attention",
    "ppo_clip_loss",
    "soft_logprob",
    "softmax2",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def softmax2(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax by two reads and one write of each row, where subtracting the largest entry takes three reads.

    For rows that are longer than the caches. Arguments and result are those of `torch.softmax`, within
    rounding, for inf, nan and rows of -inf too. A result below the least normal number of its arithmetic
    (2^-126; 2^-1022 in float64) may be 0, and a row whose largest entry is beyond 45,000 takes a third read.
    Short rows (65,536 entries on a CPU, 16,384 on a GPU) stay where they are: memory sees them read once.

    On CPU and CUDA/ROCm it is a compiled kernel (Numba, Triton), which ``torch.compile`` takes as one
    operator and ``torch.func`` maps and differentiates. Second derivatives are torch operations; forward
    mode is not there. For tensor subclasses, and where no compiler serves, it is torch's own. Arithmetic is
    in float32 (float64 for float64). Along another dimension than the last one rows are copied first, and
    results back.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        dim: along which results sum to 1.
        dtype: to which ``x`` is cast first.

    Returns:
        Of the shape of ``x``, contiguous; of its dtype, or float32 inside CUDA's autocast.

    Raises:
        TypeError: a dtype that has no softmax; a nested or sparse tensor, or none.
        IndexError: ``x`` has no such dimension.

    Example:
        >>> import torch, optx
        >>> optx.functional.softmax2(torch.tensor([[0.0, 0.0], [-1000.0, float("-inf")]]))
        tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]])

    Source: "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
    """
    x = _checked("softmax2", x, dtype)
    if x.numel() == 0 or type(x) not in rows.PLAIN:
        return torch.softmax(x, dim)
    if x.ndim == 0:
        return softmax2(x.reshape(1), dim).reshape(())
    last = x.movedim(dim, -1)
    return rows.softmax(last).movedim(-1, dim).contiguous()


def logsumexp2(x: Tensor, dim: int | Sequence[int] = -1, keepdim: bool = False) -> Tensor:
    """The logarithm of a row's sum of exponentials, by one read.

    That is one read less than torch takes; see `softmax2`, whose sum it is.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        dim: over which is summed, one or several.
        keepdim: leave them there, with size 1.

    Returns:
        Of the shape of ``x`` without these dimensions; of its dtype, or float32 inside CUDA's autocast.

    Raises:
        TypeError: a dtype that has no exponentials; a nested or sparse tensor, or none.
        IndexError: ``x`` has no such dimension.

    Example:
        >>> import torch, optx
        >>> optx.functional.logsumexp2(torch.tensor([1000.0, 1001.0, 1002.0]))
        tensor(1002.4076)

    Source: "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
    """
    x = _checked("logsumexp2", x)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if x.numel() == 0 or x.ndim == 0 or not dims or type(x) not in rows.PLAIN:
        return torch.logsumexp(x, dims, keepdim)
    last = x.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    found = rows.row_loss(last).to(x.dtype)
    if not keepdim:
        return found
    kept = {d % x.ndim for d in dims}
    return found.reshape([1 if d in kept else size for d, size in enumerate(x.shape)])


def cross_entropy2(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of class numbers: logits are read once, and for the gradient read again and written.

    Neither probabilities nor their logarithms are kept, only the logits and three numbers per row. The loss
    of a row is log(sum(exp(z))) - z_y, where what the two have in common costs no digits.

    Arguments, shapes and reductions are those of `torch.nn.functional.cross_entropy`, for class numbers.
    Label smoothing reads the logits once more in either direction. See `softmax2` for what computes.

    Args:
        logits: unnormalised scores, shape (C,), (N, C) or (N, C, d1, ...); float16, bfloat16, float32 or
            float64.
        target: class numbers in [0, C), any integer dtype, shape (), (N,) or (N, d1, ...).
        weight: weight of each class, shape (C,).
        ignore_index: samples with this class number count for nothing, whatever their logits.
        reduction: ``"mean"`` (over the weights of the samples that count), ``"sum"`` or ``"none"``.
        label_smoothing: share of each target that is spread evenly over the classes, in [0, 1].

    Returns:
        The loss, in nats: a scalar, or the target's shape for ``"none"``. Its dtype is the logits', or
        float32 inside autocast. A mean over no sample is nan and has zeros for a
        gradient, as in torch.

    Raises:
        ShapeError: target or weight do not fit the logits.
        OptxError: an option out of range, or tensors on two devices.
        TypeError: a dtype that can't be used; class probabilities; a nested or sparse tensor, or none.
        IndexError: a class number out of range, found on CPU; on a GPU it is a device-side assertion.

    Example:
        >>> import torch, optx
        >>> logits = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
        >>> loss = optx.functional.cross_entropy2(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> round(loss.item(), 6), logits.grad
        (0.169846, tensor([[-0.1562,  0.0420,  0.1142]]))

    Source: "The Two-Pass Softmax Algorithm", arXiv 2001.04438 (the log of the sum is a by-product there).
    """
    _check_options(reduction, label_smoothing)
    _check_shapes(logits, target, weight)
    if type(logits) not in rows.PLAIN:
        return F.cross_entropy(
            logits, target, weight, None, ignore_index, None, reduction, label_smoothing=label_smoothing
        )
    target = target.to(torch.int64)
    math = rows.math_dtype(logits.dtype)
    counts = target != ignore_index
    labels = target.masked_fill(~counts, 0)
    own = counts.to(math)
    if weight is not None:
        weight = weight.detach().to(math).contiguous()
        own = own * weight[labels]
    loss = _losses(logits, labels, own, counts, weight, label_smoothing)
    if reduction == "mean":
        total = own.sum()
        empty = total == 0  # a mean of nan, of which, as in torch, nothing reaches the gradient
        loss = (loss.sum() / total.masked_fill(empty, 1)).masked_fill(empty, torch.nan)
    elif reduction == "sum":
        loss = loss.sum()
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _losses(
    logits: Tensor, labels: Tensor, own: Tensor, counts: Tensor, weight: Tensor | None, smoothing: float
) -> Tensor:
    """Each sample's loss."""
    classes = logits.shape[0 if logits.ndim == 1 else 1]
    share = own * (1.0 - smoothing) if smoothing else own
    mass = even = None
    if smoothing:
        even = counts.to(own.dtype) * (smoothing / classes)
        mass = share + even * (classes if weight is None else weight.sum())
    last = logits.movedim(0 if logits.ndim == 1 else 1, -1)
    return rows.row_loss(last, labels, share, mass, weight, even)


def _checked(owner: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    _check_dense(owner, "x", x)
    x = x if dtype is None else x.to(dtype)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{owner}: x has dtype {x.dtype}; use float16, bfloat16, float32 or float64.")
    cuda = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return x.float() if cuda and x.dtype.itemsize == 2 else x


def _check_dense(owner: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{owner}: {name} is of type {type(x).__name__}; it must be a tensor.")
    if x.is_nested or x.layout != torch.strided:
        what, way = str(x.layout).removeprefix("torch."), f"{name}.to_dense()"
        if x.is_nested:
            what, way = "nested", f"one of {name}.unbind() at a time"
        raise TypeError(f"{owner}: {name} is {what}; it must be dense: use {way}.")


def _check_options(reduction: str, label_smoothing: float) -> None:
    check_choice("cross_entropy2", "reduction", reduction, ("mean", "sum", "none"))
    check_range("cross_entropy2", "label_smoothing", label_smoothing, 0.0, 1.0)


def _check_shapes(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    owner = "cross_entropy2"
    for name, tensor in (("logits", logits), ("target", target), ("weight", weight)):
        if tensor is not None:
            _check_dense(owner, name, tensor)
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"{owner}: logits have dtype {logits.dtype}; use float16, bfloat16, float32 or float64."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"{owner}: target has dtype {target.dtype}; it must be class numbers, of an integer dtype. For "
            "class probabilities use torch.nn.functional.cross_entropy."
        )
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise OptxError(
                f"{owner}: {name} is on {tensor.device} and logits are on {logits.device}; move {name} there."
            )
    at = 0 if logits.ndim == 1 else 1
    if logits.ndim == 0 or logits.shape[at] == 0:
        raise ShapeError(
            f"{owner}: logits of shape {tuple(logits.shape)} have no class; they must have shape (C,), "
            "(N, C) or (N, C, d1, ...)."
        )
    wanted = logits.shape[:at] + logits.shape[at + 1 :]
    if target.shape != wanted:
        raise ShapeError(
            f"{owner}: target has shape {tuple(target.shape)}; "
            f"{wanted_shape(logits.shape, target.shape, wanted)}"
        )
    classes = logits.shape[at]
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        raise ShapeError(
            f"{owner}: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; it must be a "
            f"floating tensor of shape ({classes},), one number per class."
        )
