"""y = (W + D) x + b, where D is a low-rank product under a mask: dense, and never kept for backward.

D = s M * (B A) (MaskLoRA) or M * W * (B A - 1) (ScaleLoRA); * is elementwise. Left to autograd, every layer
of a model would keep such a D, of the weight's size, until backward; here each layer makes it anew.

Source: PERP, arXiv 2312.15230, MaskLoRA and ScaleLoRA.
"""

# A, B, D and W are the paper's letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optx._mask_bits import keep_, unpack
from optx.inject._weights import in_sum_precision

Grads = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Shape:
    """What a weight is to its module.

    Attributes:
        scale: s of MaskLoRA; None: ScaleLoRA.
        transposed: the weight is (in, out).
        stride: of a convolution; and
        padding: likewise, with the input padded already where it is not a number of zeros; and
        dilation: likewise; and
        groups: likewise, 0 for a matrix.
    """

    scale: float | None
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 0


def change(base: Tensor, A: Tensor, B: Tensor, bits: Tensor, shape: Shape) -> Tensor:
    """D, in the base's shape and the precision of sums.

    Args:
        base: W without what is merged into it.
        A: (r, in), for convolutions (r, in / groups * kernel).
        B: (out, r).
        bits: the packed mask, of the base's shape.
        shape: of the module.
    """
    D = _low(A, B, base.shape, shape.transposed)
    D = D.sub_(1).mul_(base) if shape.scale is None else D.mul_(shape.scale)
    return _masked(D, bits)


def _low(A: Tensor, B: Tensor, like: torch.Size, transposed: bool) -> Tensor:
    """B A in a weight's shape."""
    A, B = in_sum_precision(A), in_sum_precision(B)
    return (A.t() @ B.t() if transposed else B @ A).view(like)


def _masked(D: Tensor, bits: Tensor) -> Tensor:
    """D with zeros where the mask has them, in place."""
    plain = type(D) is Tensor and D.is_contiguous() and not _is_traced()
    if plain and not (torch.is_grad_enabled() and D.requires_grad):
        return keep_(D, bits)
    return D.masked_fill_(~_kept(bits, D.shape), 0)


def _is_traced() -> bool:
    """Whether operations are rewritten, so that this function's own backward would be in the way."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _kept(bits: Tensor, shape: torch.Size) -> Tensor:
    if not torch.compiler.is_compiling():
        return unpack(bits, shape)
    # By shifts, which a compiler fuses, and without the table that unpack keeps.
    spread = bits.unsqueeze(-1) >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    return spread.flatten(1)[:, : math.prod(shape[1:])].reshape(shape).bool()


def summed(W: Tensor, base: Tensor | None, A: Tensor, B: Tensor, bits: Tensor, shape: Shape) -> Tensor:
    """W + D in W's own precision, rounded once, as a merge would write it."""
    with torch.autocast(W.device.type, enabled=False):
        return change(W if base is None else base, A, B, bits, shape).add_(W).to(W.dtype)


def _applied(x: Tensor, W: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    if not shape.groups:
        return F.linear(x, W.t() if shape.transposed else W, bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[W.ndim - 3]
    return conv(x, W, bias, shape.stride, shape.padding, shape.dilation, shape.groups)


def product(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor],
    bits: Tensor,
    shape: Shape,
    base: Tensor | None = None,
) -> Tensor:
    """(W + D) x + b.

    Args:
        x: (..., in), or what a convolution takes; autocast counts.
        W: the weight as it is now, (out, in) or (in, out), or of a convolution.
        bias: (out,).
        factors: A and B.
        bits: the packed mask.
        shape: of the module.
        base: W without what is merged into it; None: that is W.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        if _is_traced():  # by torch.compile, whose partition says what is kept, or by vmap and its like
            W_now = summed(W, base, *factors, bits, shape)
            return _applied(x, W_now.to(dtype or W.dtype), bias, shape)
        return _Product.apply(x, W, bias, base, *factors, bits, shape, dtype or W.dtype)  # pyright: ignore


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        base: Tensor | None,
        A: Tensor,
        B: Tensor,
        bits: Tensor,
        shape: Shape,
        dtype: torch.dtype,
    ) -> Tensor:
        return _applied(x, summed(W, base, A, B, bits, shape).to(dtype), bias, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.shape, ctx.dtype = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        with torch.autocast(grads[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                return (*_differentiable(ctx, grads[0]), None, None, None)
            return (*_gradients(ctx, grads[0]), None, None, None)


def _differentiable(ctx: Any, grad: Tensor) -> Grads:
    """By autograd's own graph, for a derivative of the gradients (create_graph=True)."""
    x, W, bias, base, A, B, bits = ctx.saved_tensors
    y = _applied(x, summed(W, base, A, B, bits, ctx.shape).to(ctx.dtype), bias, ctx.shape)
    given: list[Tensor | None] = [x, W, bias, base, A, B]
    asked = [i for i, needed in enumerate(ctx.needs_input_grad[:6]) if needed]
    found = torch.autograd.grad(
        y, [one for i in asked if (one := given[i]) is not None], grad, create_graph=True
    )
    by_place = dict(zip(asked, found, strict=True))
    return tuple(by_place.get(i) for i in range(6))


def _gradients(ctx: Any, grad: Tensor) -> Grads:
    """Gradients of x, W, b, the base, A and B; of what is dense, one layer's at a time is there."""
    x, W, bias, base, A, B, bits = ctx.saved_tensors
    shape: Shape = ctx.shape
    need_x, need_W, need_bias, need_base, *need_factors = ctx.needs_input_grad[:6]
    dx = dW = dbias = dbase = dA = dB = None
    if need_x:
        dx = _of_input(grad, x, summed(W, base, A, B, bits, shape).to(ctx.dtype), shape)
    if need_bias and bias is not None:
        along = 1 if shape.groups else grad.ndim - 1
        dbias = grad.sum([axis for axis in range(grad.ndim) if axis != along])
    if need_W or need_base or any(need_factors):
        G = _of_weight(grad, x, W, shape)
        H = _masked(in_sum_precision(G.clone() if need_W else G), bits)
        dW = G if need_W else None
        del G
        if shape.scale is None and (need_base or (need_W and base is None)):
            own = _low(A, B, W.shape, shape.transposed).sub_(1).mul_(H)
            dW, dbase = (own.add_(dW), None) if base is None and dW is not None else (dW, own)
        H = H.mul_(W if base is None else base) if shape.scale is None else H.mul_(shape.scale)
        H = H.t() if shape.transposed else H.flatten(1)
        dA = (in_sum_precision(B).t() @ H).to(A.dtype) if need_factors[0] else None
        dB = (H @ in_sum_precision(A).t()).to(B.dtype) if need_factors[1] else None
    return dx, None if dW is None else dW.to(W.dtype), dbias, dbase, dA, dB


def _of_input(grad: Tensor, x: Tensor, W: Tensor, shape: Shape) -> Tensor:
    if not shape.groups:
        return grad @ (W.t() if shape.transposed else W)
    return _of_convolution(grad, x, W, shape, (True, False))[0]


def _of_weight(grad: Tensor, x: Tensor, W: Tensor, shape: Shape) -> Tensor:
    if shape.groups:
        return _of_convolution(grad, x, W.to(x.dtype), shape, (False, True))[1]
    rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return columns.t() @ rows if shape.transposed else rows.t() @ columns


def _of_convolution(grad: Tensor, x: Tensor, W: Tensor, shape: Shape, wanted: tuple[bool, bool]) -> Any:
    none = [0] * len(shape.stride)
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        W,
        None,
        list(shape.stride),
        list(shape.padding),
        list(shape.dilation),
        False,
        none,
        shape.groups,
        [*wanted, False],
    )
