"""Softmax in two passes as functions of autograd over operators of torch, over the last dimension.

``torch.compile`` sees four operators in the place of compiled kernels: ``optx::softmax2``,
``optx::row_loss2`` (of which the log of a sum is the plainest), and their gradients. Functions with
derivatives and with rules for ``torch.func`` are around them. Second derivatives are torch operations.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx.kernels.available import why_unavailable
from optx.kernels.softmax import rows as torch_rows
from optx.kernels.softmax.layout import FIELDS
from optx.kernels.softmax.rows import math_dtype as math_dtype

PLAIN = (Tensor, nn.Parameter)
"""Types that kernels serve; what else there is computes by torch's own functions."""


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, which is not empty."""
    return cast(Tensor, _Softmax.apply(x))


def row_loss(
    x: Tensor,
    labels: Tensor | None = None,
    share: Tensor | None = None,
    mass: Tensor | None = None,
    weight: Tensor | None = None,
    even: Tensor | None = None,
) -> Tensor:
    """``mass log(sum(exp(x))) - share x[label] - even sum(weight x)`` of each row.

    Without labels the log of the sum alone, which is infinite where an entry is; the loss of such a row is
    nan. All numbers are in the dtype of arithmetic.

    Args:
        x: (..., C), C above 0.
        labels: int64 (...), in range.
        share: (...).
        mass: (...); a row of mass 0 is all zeros. None: as ``share``.
        weight: (C,), or None: ones.
        even: (...), or None: zeros.
    """
    return cast(tuple[Tensor, Tensor], _RowLoss.apply(x, labels, share, mass, weight, even))[0]


def kernels(x: Tensor) -> ModuleType:
    """Who computes: a compiled kernel on CPU and CUDA/ROCm, torch operations else."""
    if x.is_cuda and why_unavailable("triton") is None:
        from optx.kernels.softmax import pairs_triton

        return pairs_triton
    if x.device.type == "cpu" and why_unavailable("numba") is None:
        from optx.kernels.softmax import cpu

        return cpu
    return torch_rows


# ---- operators ----------------------------------------------------------------------------------------


def _operator(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"optx::{name}", mutates_args=(), schema=schema)


def _matrix(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


@_operator("softmax2", "(Tensor x) -> Tensor")
def _softmax(x: Tensor) -> Tensor:
    return kernels(x).softmax(_matrix(x)).view(x.shape)


@_operator("softmax2_backward", "(Tensor grad, Tensor y) -> Tensor")
def _softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    return kernels(y).backward(_matrix(grad), _matrix(y)).view(y.shape)


@_operator(
    "row_loss2",
    "(Tensor x, Tensor? labels, Tensor? share, Tensor? mass, Tensor? weight, Tensor? even)"
    " -> (Tensor, Tensor)",
)
def _row_loss(
    x: Tensor,
    labels: Tensor | None,
    share: Tensor | None,
    mass: Tensor | None,
    weight: Tensor | None,
    even: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The losses, and the rows' sums as `optx.kernels.softmax.cpu.fold` has them, for the gradient."""
    matrix = _matrix(x)
    if labels is not None:
        labels = labels.reshape(-1, 1)
        _check_labels(labels, x.shape[-1])
    sums = kernels(x).fold(matrix)
    m, n, shift = sums.double().unbind(-1)
    sums = sums.masked_fill(m.isnan()[:, None], math.nan)  # so that all of the row's gradient is nan
    log = m.log() + n * math.log(2)
    found = log + shift
    if labels is None or share is None:
        found = torch.where(shift.isinf(), shift, found)
        # Beside an inf a finite entry has the gradient exp(x - inf) = 0, as in torch.
        sums = torch.where((shift == math.inf)[:, None], sums.new_tensor([1.0, 0.0, math.inf]), sums)
    else:
        own = matrix.gather(1, labels).squeeze(1).double()
        share, mass = (one.reshape(-1).double() for one in (share, share if mass is None else mass))
        found = share * (log + (shift - own)) + (mass - share) * found
        if even is not None:
            found = found - even.reshape(-1).double() * _weighted(matrix, weight)
        found = torch.where(mass == 0.0, 0.0, found)
    return found.to(sums.dtype).view(x.shape[:-1]), sums.view(*x.shape[:-1], FIELDS)


@_operator(
    "row_loss2_backward", "(Tensor x, Tensor sums, Tensor scale, Tensor? labels, Tensor? lone) -> Tensor"
)
def _spread(x: Tensor, sums: Tensor, scale: Tensor, labels: Tensor | None, lone: Tensor | None) -> Tensor:
    rows = [_flat(one) for one in (scale, labels, scale if lone is None else lone)]
    return kernels(x).spread(_matrix(x), sums.reshape(-1, FIELDS), *rows).view(x.shape)


def _check_labels(labels: Tensor, classes: int) -> None:
    """Raise for a class number out of range; on a GPU, which is not waited for, by an assertion there."""
    bad = (labels < 0) | (labels >= classes)
    if labels.is_cuda:
        torch.ops.aten._assert_async.default(~bad.any())
    elif bool(bad.any()):
        sample = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"cross_entropy2: target {int(labels[sample])} (sample {sample} of {len(labels)}) is out of "
            f"range for {classes} classes; it must be in 0..{classes - 1}, or ignore_index."
        )


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """The weighted sum of each row in float64, a few rows at a time."""
    step = max(1, (1 << 18) // x.shape[1])
    ones = x.new_ones(x.shape[1], dtype=torch.float64) if weight is None else weight.double()
    return torch.cat([x[i : i + step].double() @ ones for i in range(0, max(len(x), 1), step)])


def _fake_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_loss(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = torch.empty(x.shape[:-1], dtype=math_dtype(x.dtype), device=x.device)
    return loss, loss.new_empty(*x.shape[:-1], FIELDS)


for _one in (_softmax, _softmax_backward, _spread):
    _one.register_fake(_fake_like)
_row_loss.register_fake(_fake_loss)


# ---- derivatives --------------------------------------------------------------------------------------


def _by_rows(info: Any, in_dims: tuple[int | None, ...], args: tuple[Tensor | None, ...]) -> list[Any]:
    """Arguments whose first dimension is what `torch.vmap` maps over: rows are rows."""
    moved: list[Tensor | None] = []
    for arg, dim in zip(args, in_dims, strict=True):
        if arg is not None:
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        moved.append(arg)
    return moved


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _softmax(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return cast(Tensor, _SoftmaxGrad.apply(grad, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, int]:
        return _Softmax.apply(*_by_rows(info, in_dims, args)), 0


class _SoftmaxGrad(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, y: Tensor) -> Tensor:
        return _softmax_backward(grad, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        first, y = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)
        of_y = grad * (first - (first * y).sum(-1, keepdim=True)) - first * along
        return y * (grad - along), of_y

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, int]:
        return _SoftmaxGrad.apply(*_by_rows(info, in_dims, args)), 0


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        return _row_loss(x, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, labels, share, mass, weight, even, sums = ctx.saved_tensors
        lone = None if share is None else grad * share
        scale = grad * mass if mass is not None else grad if lone is None else lone
        found = cast(Tensor, _Spread.apply(x, sums, scale, labels, None if lone is scale else lone))
        if even is not None:
            pull = (grad * even).unsqueeze(-1)
            found = found - (pull if weight is None else pull * weight).to(found.dtype)
        return found, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, Any]:
        moved = _by_rows(info, in_dims, args)
        if args[4] is not None:
            if in_dims[4] is not None:
                raise NotImplementedError("cross_entropy2: torch.vmap over weight; it maps over logits only.")
            moved[4] = args[4]
        return _RowLoss.apply(*moved), (0, 0)


class _Spread(torch.autograd.Function):
    """``scale softmax(x)``, less ``lone`` (None: ``scale``) at labels, from the rows' sums."""

    @staticmethod
    def forward(x: Tensor, sums: Tensor, scale: Tensor, labels: Tensor | None, lone: Tensor | None) -> Tensor:
        return _spread(x, sums, scale, labels, lone)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, scale, labels, lone = inputs
        ctx.save_for_backward(x, scale, labels)
        ctx.one = lone is None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, labels = ctx.saved_tensors
        p, grad = softmax(x).to(scale.dtype), grad.to(scale.dtype)
        along = (p * grad).sum(-1)
        of_x = (scale.unsqueeze(-1) * p * (grad - along.unsqueeze(-1))).to(x.dtype)
        if labels is None:
            return of_x, None, along, None, None
        own = grad.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (of_x, None, along - own, None, None) if ctx.one else (of_x, None, along, None, -own)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, int]:
        return _Spread.apply(*_by_rows(info, in_dims, args)), 0
