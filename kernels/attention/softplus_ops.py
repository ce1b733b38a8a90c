"""Softplus attention as operations of torch, which ``torch.compile`` takes as they are.

They go to the kernel of the device: blocks of rows on CPU, Triton on CUDA and ROCm.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optx.kernels.attention import softplus_blocks
from optx.kernels.attention import softplus_rows as reference
from optx.kernels.attention.softplus_rows import Options, math_dtype

__all__ = ["OPERATIONS", "attention"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options
) -> Tensor:
    """What attention gives, (B, H, T, e), in v's dtype.

    Args:
        q: (B, H, T, d), on CPU or a GPU.
        k: (B, H', S, d), where H' divides H.
        v: (B, H', S, e).
        mask: bool, broadcastable to (B, H, T, S), True where a key is seen; or None.
        seed: one int64, of the dropout; None without.
        options: power, causal, dropout.
    """
    return OPERATIONS.softplus_attention(q, k, v, mask, seed, *options)[0]


def _kernel(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return softplus_blocks
    from optx.kernels.attention import softplus_triton

    return softplus_triton


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    power: float,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _kernel(q.device).forward(q, k, v, mask, Options(power, causal, dropout), seed)


def _like_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows = q.shape[:3]
    stats = q.new_empty((3, batch, heads, rows), dtype=math_dtype(q.dtype))
    return v.new_empty((batch, heads, rows, v.shape[-1])), stats


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    out: Tensor,
    power: float,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        kernel = _kernel(q.device)
        return kernel.backward(grad, q, k, v, mask, stats, out, Options(power, causal, dropout), seed)


def _like_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, seed, *options = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(q, k, v, mask, seed, stats, out)
    ctx.options = options


def _back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = OPERATIONS.softplus_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *found, None, None, None, None, None


def _keep_again(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, q, k, v, mask, seed, _, _, *options = inputs
    ctx.save_for_backward(grad, q, k, v, mask, seed)
    ctx.options = Options(*options)


def _twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives: torch's own, of attention with its weights written out, T x S numbers."""
    *given, mask, _ = ctx.saved_tensors
    if ctx.options.dropout:
        raise NotImplementedError(
            "softplus attention: second derivatives (create_graph=True) are not there with dropout, which "
            f"is {ctx.options.dropout:g}; set it to 0, or the model to evaluation mode."
        )
    more = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as the gradient may depend on the queries itself, which is another way to them.
        given = [x.view_as(x) if x.requires_grad and more else x.detach().requires_grad_() for x in given]
        grad, q, k, v = given
        out = reference.attended(reference.weights(q, k, mask, ctx.options), v)
        first = torch.autograd.grad(out, (q, k, v), grad, create_graph=True)
        found = torch.autograd.grad(first, given, grads, create_graph=more, materialize_grads=True)
    return *found, *[None] * 7


# Not torch.library.custom_op, whose first call loads the whole of torch.compile.
_LIBRARY: Any = torch.library.Library("optx", "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed"
_NUMBERS = "float power, bool causal, float dropout"
_LIBRARY.define(f"softplus_attention({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"softplus_attention_backward(Tensor grad, {_TENSORS}, Tensor stats, Tensor out, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor)"
)
for _name, _function, _like in (
    ("softplus_attention", _forward, _like_forward),
    ("softplus_attention_backward", _backward, _like_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optx::{_name}", _like, lib=_LIBRARY)  # pyright: ignore
torch.library.register_autograd("optx::softplus_attention", _back, setup_context=_keep, lib=_LIBRARY)  # pyright: ignore
torch.library.register_autograd(
    "optx::softplus_attention_backward", _twice, setup_context=_keep_again, lib=_LIBRARY
)  # pyright: ignore
OPERATIONS: Any = torch.ops.optx
