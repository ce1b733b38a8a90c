"""S4D's kernel as an operation of torch, for ``torch.compile``: its compilers have no complex numbers.

They would leave each of its complex operations to torch as it is and compile what is between them, one small
program after the other, for minutes. As one operation it is computed as without compilation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx.inject._s4d_kernel import Disc, as_complex, discretise, kernel

__all__ = ["OPERATIONS", "kernel_in_graph"]


def kernel_in_graph(weights: tuple[Tensor, ...], disc: Disc, length: int, dtype: torch.dtype) -> Tensor:
    """`kernel` of log_dt, log_A_real, A_imag, B and C, (..., width, length)."""
    return OPERATIONS.s4d_kernel(*weights, disc, length, dtype)


def _forward(
    log_dt: Tensor,
    log_A_real: Tensor,
    A_imag: Tensor,
    B: Tensor,
    C: Tensor,
    disc: Disc,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    discrete = discretise(log_dt, log_A_real, A_imag, B, disc)
    return kernel(discrete, as_complex(C) * discrete.B, length, dtype).contiguous()


def _like_forward(*given: Any) -> Tensor:
    C, _, length, dtype = given[4:]
    return C.new_empty((*C.shape[:-2], length), dtype=dtype)


def _backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    weights, options = given[:5], given[5:]
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in weights]
        found = torch.autograd.grad(_forward(*leaves, *options), leaves, grad)  # pyright: ignore
    return tuple(g.contiguous() for g in found)


def _like_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in given[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = OPERATIONS.s4d_kernel_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *found, None, None, None


# Not torch.library.custom_op, whose first call loads the whole of torch.compile.
_LIBRARY: Any = torch.library.Library("optx", "FRAGMENT")
_ARGUMENTS = (
    "Tensor log_dt, Tensor log_A_real, Tensor A_imag, Tensor B, Tensor C, str disc, SymInt length, "
    "ScalarType dtype"
)
_LIBRARY.define(f"s4d_kernel({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"s4d_kernel_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
for _name, _function, _like in (
    ("s4d_kernel", _forward, _like_forward),
    ("s4d_kernel_backward", _backward, _like_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optx::{_name}", _like, lib=_LIBRARY)  # pyright: ignore
torch.library.register_autograd("optx::s4d_kernel", _back, setup_context=_keep, lib=_LIBRARY)  # pyright: ignore
OPERATIONS: Any = torch.ops.optx
