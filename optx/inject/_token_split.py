"""Tokens dealt out evenly and at random, and gathered again: EWA's random uniform partition.

Source: EWA, arXiv 2308.06093: a fresh permutation of all tokens in every forward, cut into equal pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx.inject._nested import tensors_in


class Order(NamedTuple):
    """A permutation of tokens, and the one that undoes it."""

    there: Tensor
    back: Tensor


class Partition:
    """The order in which the modules of one FFN deal out their tokens: one for all of them in a forward.

    A module that is called a second time begins a new forward, as activation checkpointing does, which gives
    the random numbers of before back.
    """

    def __init__(self) -> None:
        self.order: Order | None = None
        self._called: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"order": None, "_called": set[int]()}  # a copy of the model has computed nothing

    def draw(self, member: int, count: int, device: torch.device) -> Order:
        """The order for a call.

        Args:
            member: which of the FFN's modules is called.
            count: how many tokens it has.
            device: of the tokens.
        """
        known = None if member in self._called else self.order
        if known is None or len(known.there) != count or known.there.device != device:
            there = torch.randperm(count, device=device)
            back = torch.empty_like(there)
            back[there] = torch.arange(count, device=device)
            known = self.order = Order(there, back)
            self._called = set()
        self._called.add(member)
        return known


class _Reordered(torch.autograd.Function):
    """Rows in another order; the gradient takes the way back, and has a factor.

    As of torch's own indexing, but no row is added to another, so that the backward pass is a copy too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, there: Tensor, back: Tensor, factor: float) -> Tensor:
        return x.index_select(0, there)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, there, back, ctx.factor = inputs
        ctx.save_for_backward(there, back)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        there, back = ctx.saved_tensors
        grad = _reordered(grads[0], Order(back, there), 1.0)
        return (grad if ctx.factor == 1.0 else grad * ctx.factor), None, None, None


def _reordered(x: Tensor, order: Order, factor: float) -> Tensor:
    return _Reordered.apply(x, order.there, order.back, factor)  # type: ignore[no-any-return]


def dealt(call: Call, x: Tensor, order: Order, experts: list[Callable[..., Any]], scale: float) -> Tensor:
    """What experts make of tokens, each of an equal share.

    Args:
        call: how the module was called.
        x: (..., width), its tokens.
        order: of these.
        experts: the first ones get one token more where the number is not divisible.
        scale: of the gradients of the experts' parameters; those of the tokens stay what they are.

    Returns:
        (..., new width), each token where it was.
    """
    lead, pieces = x.shape[:-1], len(experts)
    shape = (1,) * (x.ndim - 2)

    def cut(value: Any) -> list[Any]:
        if not isinstance(value, Tensor):
            return [value] * pieces
        rows = _reordered(value.reshape(lead.numel(), value.shape[-1]), order, 1 / scale)
        return [one.view(*shape, *one.shape) for one in rows.tensor_split(pieces)]

    args = [cut(value) for value in call.args]
    kwargs = {name: cut(value) for name, value in call.kwargs.items()}
    made = [
        expert(*(one[i] for one in args), **{name: one[i] for name, one in kwargs.items()})
        for i, expert in enumerate(experts)
    ]
    rows = torch.cat([_rows_of(call.path, one) for one in made])
    return _reordered(rows, Order(order.back, order.there), scale).view(*lead, rows.shape[-1])


class Call(NamedTuple):
    """A module's call."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_of(path: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call whose every tensor can be dealt out as the tokens x are.

    Raises:
        ShapeError: one has other leading axes; names the module.
        OptxError: tensors are inside of something.
    """
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            if any(True for _ in tensors_in(value)):
                raise OptxError(
                    f"EWA: {path!r} is called with a {type(value).__name__} of tensors, which can't be dealt "
                    "out to experts. Leave that module out of targets."
                )
        elif value.ndim != x.ndim or value.shape[:-1] != x.shape[:-1]:
            raise ShapeError(
                f"EWA: {path!r} is called with tensors of shapes {tuple(x.shape)} and {tuple(value.shape)}; "
                "all must have one row per token to be dealt out to experts. Leave it out of targets."
            )
    return Call(path, args, kwargs)


def _rows_of(path: str, made: Any) -> Tensor:
    if not isinstance(made, Tensor):
        raise OptxError(
            f"EWA: {path!r} returns a {type(made).__name__} and no tensor, so what experts return can't be "
            "put together. Leave that module out of targets."
        )
    return made.reshape(-1, made.shape[-1])
