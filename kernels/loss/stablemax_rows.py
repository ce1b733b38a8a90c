"""StableMax cross-entropy of a matrix of rows, in torch operations.

This is the reference of the compiled kernels (`stablemax_triton`, `stablemax_cpu`), and the path itself
where neither serves: under ``torch.compile``, for tensor subclasses, on other devices. All three share the
two functions `forward` and `backward` below, argument by argument, and the elementwise `terms`.

With s the numerator (`terms`), a row's loss is, for a hard label y of weight a and soft weights q::

    loss = a log1p(rest / s_y) + mass log(total) - sum_k q_k log s_k
    rest = sum_{k != y} s_k,   total = rest + s_y,   mass = sum_k q_k

(arXiv 2501.04697, section 4.1, with -log(s_y / total) written as log1p(rest / s_y).) Keeping ``rest`` rather
than ``total`` matters: ``total - s_y`` is 0 in float32 as soon as z_y outweighs the other terms 2^24 times,
which is the collapse that StableMax is there to avoid.
"""
# `terms` is read by a compiler that looks up annotations, so its types stand in a comment.
# pyright: reportTypeCommentUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator  # noqa: F401 (a type comment's)
from typing import Any, NamedTuple  # noqa: F401

import torch
from torch import Tensor


class Options(NamedTuple):
    """What a loss is told besides logits and targets.

    Args:
        weight: weight of each class, shape (C,), contiguous, in the dtype of the mathematics; None for
            ones.
        ignore_index: rows with this label have loss 0 and gradient 0.
        smoothing: share of a target that is spread evenly over all classes, in [0, 1].
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    smoothing: float = 0.0


class RowSums(NamedTuple):
    """What `forward` gives, each of shape (R,) and in the dtype of the mathematics.

    Args:
        loss: the loss of each row.
        rest: the sum of s over the row without the label's own term; over all of it for soft targets.
        mass: the sum of the soft weights q; None where there are none (a hard label, no smoothing).
    """

    loss: Tensor
    rest: Tensor
    mass: Tensor | None


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of ``dtype`` are computed with: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def terms(x, one, where):
    # type: (Any, Any, Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]
    """StableMax's numerator s(x) and the derivative of its logarithm, from one division.

    s(x) = 1 + x for x >= 0 and 1 / (1 - x) below (arXiv 2501.04697, definition 4), and
    (log s)'(x) = 1 / (1 + |x|), which is s itself below 0. Neither branch has a pole where the other one
    holds, so torch may differentiate this too (the paper's 1 / (1 - x) gives nan at x = 1).

    Written once for three compilers: torch calls it, Triton and Numba compile it.

    Args:
        x: logits, of any shape.
        one: the number 1 in x's dtype (Numba would widen a plain 1 to float64).
        where: the compiler's elementwise choice.

    Returns:
        s(x) and 1 / (1 + |x|).

    Example:
        >>> terms(torch.tensor([2.0, -1.0, 0.0]), 1.0, torch.where)
        (tensor([3.0000, 0.5000, 1.0000]), tensor([0.3333, 0.5000, 1.0000]))
    """
    slope = one / (one + where(x < 0, -x, x))
    return where(x < 0, slope, one + x), slope


def _tensor_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    """`terms` of a tensor; where nothing is to be differentiated, without torch.where.

    That takes ten times as long as torch.maximum on CPU. The larger of 1 + x and 1 / (1 + |x|) is s, since
    (1 + x)(1 - x) <= 1, but where rounding makes them equal its derivative would be a mean of two.
    """
    if torch.is_grad_enabled():
        return terms(x, 1.0, torch.where)
    slope = x.abs().add_(1.0).reciprocal_()
    return torch.maximum(1.0 + x, slope), slope


def forward(logits: Tensor, target: Tensor, options: Options) -> RowSums:
    """The loss of each row, by differentiable torch operations.

    Args:
        logits: shape (R, C), any float dtype.
        target: labels, int64 of shape (R,), or class probabilities, floating of shape (R, C).
        options: class weights, ignored label, smoothing.
    """
    x = logits.to(math_dtype(logits.dtype))
    s, _ = _tensor_terms(x)
    soft = _soft_weights(target, options, x)
    if target.is_floating_point():
        rest = total = s.sum(1)
        loss = torch.zeros_like(total)
        ignored = None
    else:
        label, ignored, share = _labels(target, options, x)
        own = s.gather(1, label).squeeze(1)
        rest = s.scatter(1, label, 0.0).sum(1)
        total = rest + own
        loss = share * torch.log1p(rest / own)
    mass = None
    if soft is not None:
        mass = soft.sum(1).expand(loss.shape)
        # xlogy: a class of soft weight 0 counts for nothing, even where its logit is -inf.
        loss = loss + mass * total.log() - torch.xlogy(soft, s).sum(1)
    return RowSums(loss if ignored is None else loss.masked_fill(ignored, 0.0), rest, mass)


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, rest: Tensor, mass: Tensor | None, options: Options
) -> Tensor:
    """The gradient of ``sum(grad * loss)`` with respect to the logits, in the logits' dtype.

    With h' = 1 / (1 + |z|), row by row::

        d loss / d z_k = h'_k (a (s_k / total - [k = y]) + mass s_k / total - q_k)

    where the label's own entry, s_y / total - 1, is taken as -rest / total, without cancellation.

    Args:
        grad: shape (R,), in the dtype of the mathematics.
        logits: as given to `forward`.
        target: as given to `forward`.
        rest: from `forward`.
        mass: from `forward`.
        options: as given to `forward`.
    """
    x = logits.to(math_dtype(logits.dtype))
    s, slope = _tensor_terms(x)
    soft = _soft_weights(target, options, x)
    rest = rest[:, None]
    scale = slope.mul_(grad[:, None])
    if target.is_floating_point():
        assert soft is not None  # probabilities always have soft weights, and their sum
        assert mass is not None
        return s.mul_(mass[:, None] / rest).sub_(soft).mul_(scale).to(logits.dtype)
    label, ignored, share = _labels(target, options, x)
    total = rest + s.gather(1, label)
    smooth = None if soft is None or mass is None else s * (mass[:, None] / total) - soft
    result = s.scatter_(1, label, -rest).mul_(share[:, None] / total)
    if smooth is not None:
        result = result.add_(smooth)
    return result.mul_(scale).masked_fill_(ignored[:, None], 0.0).to(logits.dtype)


def chunked_forward(logits: Tensor, target: Tensor, options: Options) -> RowSums:
    """`forward` over a few rows at a time, so that its temporaries stay small (and in cache)."""
    pieces = [forward(logits[c], target[c], options) for c in _chunks(logits)]
    if len(pieces) == 1:
        return pieces[0]
    loss, rest, masses = zip(*pieces, strict=True)
    return RowSums(torch.cat(loss), torch.cat(rest), None if masses[0] is None else torch.cat(masses))


def chunked_backward(
    grad: Tensor, logits: Tensor, target: Tensor, rest: Tensor, mass: Tensor | None, options: Options
) -> Tensor:
    """`backward` over a few rows at a time."""
    chunks = list(_chunks(logits))
    if len(chunks) == 1:
        return backward(grad, logits, target, rest, mass, options)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for c in chunks:
        result[c] = backward(
            grad[c], logits[c], target[c], rest[c], None if mass is None else mass[c], options
        )
    return result


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows, classes = logits.shape
    elements = 1 << (18 if logits.device.type == "cpu" else 22)  # 1 MiB of float32 fits a core's L2
    step = max(1, elements // classes)
    for start in range(0, max(rows, 1), step):
        yield slice(start, start + step)


def _labels(target: Tensor, options: Options, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels safe to gather with (R, 1), the ignored rows (R,), and each label's weight a (R,)."""
    ignored = target == options.ignore_index
    label = target.masked_fill(ignored, 0)
    hard = 1.0 - options.smoothing
    share = like.new_full(label.shape, hard) if options.weight is None else options.weight[label] * hard
    return label[:, None], ignored, share


def _soft_weights(target: Tensor, options: Options, like: Tensor) -> Tensor | None:
    """q: what each class's log probability is multiplied by, besides the label's own weight.

    Returns:
        Shape (R, C), or (1, C) where all rows agree; None where q is 0.
    """
    even = options.smoothing / like.shape[1]
    if target.is_floating_point():
        soft = target.to(like.dtype) * (1.0 - options.smoothing) + even
    elif options.smoothing > 0.0:
        soft = like.new_full((1, like.shape[1]), even)
    else:
        return None
    return soft if options.weight is None else soft * options.weight
