"""Weights made of a shared array while a module computes: kept nowhere, made again for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # pyright: ignore[reportUnknownVariableType]

from optx._errors import OptxError
from optx.kernels.available import why_unavailable
from optx.kernels.shared import mapping
from optx.kernels.shared.mapping import Place


class _Gather(torch.autograd.Function):
    """W from psi: linear in it, so that the derivative needs nothing of the forward pass."""

    @staticmethod
    def forward(ctx: Any, psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
        ctx.place, ctx.like = place, psi.new_empty(0).dtype
        return gathered(psi.detach(), place, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scatter(grads[0], ctx.place, ctx.like), None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
        ctx.place, ctx.values = place, values.dtype
        return summed(values.detach(), place, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather(grads[0], ctx.place, ctx.values), None, None


class _Linear(torch.autograd.Function):
    """x W^T + b in one node, which keeps x and psi: another node would cost as much as a small product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, psi: Tensor, bias: Tensor | None, place: Place, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(x, psi)
        ctx.place, ctx.shape = place, shape
        return F.linear(x, gathered(psi, place, x.dtype).view(shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, psi), place = grads, ctx.saved_tensors, ctx.place
        to_x = to_psi = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = g @ weight(psi, place, x.dtype).view(ctx.shape)
        flat = g.reshape(-1, ctx.shape[0])
        if ctx.needs_input_grad[1]:
            to_psi = _scatter((flat.t() @ x.reshape(-1, ctx.shape[1])).view(-1), place, psi.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_x, to_psi, to_bias, None, None


# Their stubs have no types.
_gather = cast("Callable[..., Any]", _Gather.apply)  # pyright: ignore[reportUnknownMemberType]
_scatter = cast("Callable[..., Any]", _Scatter.apply)  # pyright: ignore[reportUnknownMemberType]
_linear = cast("Callable[..., Any]", _Linear.apply)  # pyright: ignore[reportUnknownMemberType]


def linear(x: Tensor, psi: Tensor, bias: Tensor | None, place: Place, shape: torch.Size) -> Tensor | None:
    """A linear module's output; None where dtypes differ, or something looks at the operations."""
    plain = x.dtype == psi.dtype and x.dtype in (torch.float32, torch.float64) and psi.is_contiguous()
    if not plain or torch.is_autocast_enabled(x.device.type) or _in_torch(psi) or type(x) is not Tensor:
        return None
    if not torch.is_grad_enabled():
        return F.linear(x, gathered(psi, place, x.dtype).view(shape), bias)
    return _linear(x, psi, bias, place, shape)


def weight(psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """scale * sign * psi[slot], (numel,), that autograd follows to psi.

    Args:
        psi: (m,), any float dtype.
        place: of the module.
        dtype: of the result.
    """
    wide = psi.to(torch.promote_types(psi.dtype, torch.float32)).contiguous()
    if _in_torch(wide):
        return mapping.gather(wide, place, dtype)
    return _gather(wide, place, dtype)


def gathered(psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """`weight` without derivative; psi is float32 or float64, and contiguous."""
    kernels = _kernels(psi.device.type)
    return (mapping if kernels is None else kernels).gather(psi.contiguous(), place, dtype)


def summed(values: Tensor, place: Place, dtype: torch.dtype, signed: bool = True) -> Tensor:
    """Per slot the sum of scale * sign * value, (m,).

    Args:
        values: as many as the module has weights.
        place: of the module.
        dtype: of the sums; float32 or float64.
        signed: False leaves signs out.
    """
    kernels = _kernels(values.device.type)
    flat = values.contiguous().view(-1)
    return (mapping if kernels is None else kernels).scatter(flat, place, dtype, signed)


def _in_torch(psi: Tensor) -> bool:
    """Whether something looks at the operations: a compiler, a transform of functions, a subclass."""
    return (
        torch.compiler.is_compiling()
        or is_traceable_wrapper_subclass(psi)
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore
    )


@functools.cache
def _kernels(device: str) -> Any:
    """The kernels for a device; None where torch's operations serve, which make an index for the moment."""
    if device == "cpu" and why_unavailable("numba") is None:
        from optx.kernels.shared import cpu

        return cpu
    if device == "cuda" and why_unavailable("triton") is None:
        from optx.kernels.shared import gather_triton

        return gather_triton
    return None


def unsaved(W: Tensor, make: Callable[[], Tensor], psi: Tensor) -> AbstractContextManager[Any]:
    """While a module computes with W: what autograd would keep of W is made again where backward needs it.

    Args:
        W: made by `weight`.
        make: makes the same, flat, without derivative.
        psi: what it is made of; it must not change before backward.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and W.requires_grad):
        return nullcontext()
    address, version = W.untyped_storage().data_ptr(), psi._version  # pyright: ignore[reportPrivateUsage]

    def pack(tensor: Tensor) -> Any:
        own = not is_traceable_wrapper_subclass(tensor) and tensor.layout == torch.strided
        if not own or tensor.untyped_storage().data_ptr() != address:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if psi._version != version:  # pyright: ignore[reportPrivateUsage]
            raise OptxError(
                "StableRPS: the shared array was changed (a step, a load) between a forward pass and its "
                "backward pass, which makes the weights of it again. Call backward() before the step."
            )
        return make().as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
