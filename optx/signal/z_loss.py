"""The Z-loss, and the other losses that know of a row's outputs two sums and the target's.

Source: de Brebisson, Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
Spherical Family", arXiv 1604.08859; the family, arXiv 1511.05042.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from optx._errors import warn
from optx._spherical import SphericalLoss
from optx.kernels.loss.stablemax_rows import math_dtype
from optx.signal._class_rows import as_rows, check_labels, check_logits


class ZLoss(SphericalLoss):
    """The Z-loss: softplus of how far the target's standardised score is below b; or its kin.

    A row's outputs o are standardised over its D classes, z = (o - mean) / deviation, and the loss is
    softplus(a (b - z_target)) / a. Neither a number added to all outputs nor a positive factor changes it, so
    that the size of logits means nothing: a class is to stand out by deviations of its row. The order of
    classes, hence what is predicted, is softmax's. (It is not the squared log-partition penalty that is also
    called z-loss in language models.)

    All losses of the family know of a row its sum, its sum of squares and the target's output. So on a head
    that `optx.SphericalHead` serves, loss, gradient and step cost the same for any number of classes.

    Logits and labels have the shapes that `torch.nn.CrossEntropyLoss` takes: (C,), (N, C) or (N, C, d1, ...):
    classes are dimension 1, so a language model's (B, T, C) goes in as ``logits.movedim(-1, 1)``.
    Sums are in float32 (float64 for float64 logits). Only the logits and a few numbers a row are kept for the
    backward pass; second derivatives are computed by differentiable operations.

    Args:
        a: sharpness. Small: the gradient is about the same for all samples; large: max(0, b - z). None: 0.1.
        b: the deviations that a target is to stand out by; from there on the pull fades. No z is above
            sqrt(D - 1). None: 10.
        form: ``"z"``; ``"mse"``: the squared distance from the one-hot target; ``"spherical"``: log of the
            sum of o^2 + eps over the target's; ``"taylor"``: the same with 1 + o + o^2 / 2, softmax's
            second-order form. These three depend on the logits' size.
        eps: added to the deviation (``"z"``, 1e-12) or to squares (``"spherical"``, 0.01).
        ignore_index: samples with this label count for nothing, whatever their logits: their gradient is 0.
        reduction: ``"mean"`` over those that count, ``"sum"`` or ``"none"``.

    Paper values:
        ``a``, ``b``: tuned for each task, 0.01 to 1 and 1 to 50 or thereabouts (0.1 and 10 are the defaults,
        from its middle). The timing run: 1 and 0, with ``eps=1e-12``.

    Limits: A row whose logits are all equal has no gradient under the Z-loss: a head must not begin with
    zeros (a batch of such rows on a CPU is told, once). No probabilities follow from it, so there is no
    perplexity.

    Keywords: Z-loss, spherical softmax, Taylor softmax, squared error, large vocabulary, extreme
        classification, scale invariance, top-k.

    Evidence: ``optx run vocab``; ``test_z_loss.py``.

    Raises:
        OptxError: an option out of range, or of another form.
        ShapeError: labels that do not fit the logits.
        IndexError: a label out of range, found on CPU.

    Example:
        >>> import torch, optx
        >>> criterion = optx.ZLoss(a=1.0, b=0.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> criterion(logits, torch.tensor([3])), criterion(5 * logits + 1, torch.tensor([3]))
        (tensor(0.2322), tensor(0.2322))

    Source: arXiv 1604.08859; spherical and Taylor softmax, arXiv 1511.05042.
    """

    _told = False

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and class numbers."""
        classes = check_logits("ZLoss", logits, target)
        if target.is_floating_point():
            raise TypeError(
                f"ZLoss: target has dtype {target.dtype}; it takes class numbers, of an integer dtype."
            )
        rows, labels, shape = as_rows(logits, target)
        check_labels("ZLoss", labels, self.ignore_index, classes)
        counts = labels != self.ignore_index
        labels = labels.where(counts, 0)
        if torch.compiler.is_compiling():  # the compiler derives and fuses its own backward pass
            losses = self.of_rows(rows.masked_fill(~counts[:, None], 0), labels)
        else:
            self._look_for_flat(rows)
            losses = cast(Tensor, _RowLoss.apply(rows, labels, counts, self))  # pyright: ignore[reportUnknownMemberType]
        losses = torch.where(counts, losses, 0.0)
        found = self.reduced(losses.reshape(shape) if self.reduction == "none" else losses, counts.sum())
        return found if torch.is_autocast_enabled(logits.device.type) else found.to(logits.dtype)

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row by differentiable operations: (R, C) and int64 (R,)."""
        wide = logits.to(math_dtype(logits.dtype))
        target = wide.gather(1, labels[:, None]).squeeze(1)
        mean = wide.mean(1)
        variance = (wide - mean[:, None]).square().mean(1)
        return self.rows(mean, variance, target - mean, wide.shape[1], _floor(mean))

    def _look_for_flat(self, rows: Tensor) -> None:
        """A head that begins with zeros stays there; it is told at the first batch that is like that."""
        if self.form != "z" or self._told or rows.shape[1] < 2 or not len(rows) or type(rows) is not Tensor:
            return
        if (
            rows.device.type != "cpu"
            or bool((rows[0] != rows[0, :1]).any())
            or bool((rows != rows[:, :1]).any())
        ):
            return
        self._told = True
        warn(
            f"ZLoss: in all {len(rows)} rows of the batch the logits are one number, so they have no "
            "deviation and the Z-loss no gradient: what makes them won't learn. Begin with random weights."
        )


class _RowLoss(torch.autograd.Function):
    """Rows of logits to rows of loss, keeping the logits and three numbers a row.

    d loss / d o_k = even + slope o_k, and the target's has ``own`` more.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, counts: Tensor, loss: ZLoss) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = logits.to(math_dtype(logits.dtype))
        classes = wide.shape[1]
        mean = wide.mean(1)
        centred = wide - mean[:, None]
        variance = centred.square().mean(1)
        above = centred.gather(1, labels[:, None]).squeeze(1)
        found = loss.slopes(mean, variance, above, classes, _floor(mean))
        slope = 2 * found.by_variance / classes
        even = (found.by_mean - found.by_above) / classes - slope * mean
        ctx.save_for_backward(logits, labels, counts, even, slope, found.by_above)
        ctx.loss = loss
        return found.losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, counts, even, slope, own = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the result is to be differentiated again
            losses = ctx.loss.of_rows(logits.masked_fill(~counts[:, None], 0), labels)
            again = cast("tuple[Tensor]", torch.autograd.grad(losses, logits, grad, create_graph=True))
            return again[0], None, None, None
        wide = torch.addcmul((even * grad)[:, None], logits.to(slope.dtype), (slope * grad)[:, None])
        wide.scatter_add_(1, labels[:, None], (own * grad)[:, None])
        # Of what is ignored, which may be nan. A device would be stopped by a look whether there is any.
        if logits.device.type != "cpu" or not bool(counts.all()):
            wide.masked_fill_(~counts[:, None], 0)
        return wide.to(logits.dtype), None, None, None


def _floor(mean: Tensor) -> Tensor:
    """Variances that are the rounding of equal numbers."""
    return (4 * torch.finfo(mean.dtype).eps * mean).square()
