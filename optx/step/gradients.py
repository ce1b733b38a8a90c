"""A step's gradients as kernels take them: spread as their weights are, and in their memory order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._names import parameter_names
from optx.step.sharded import here, spread_as


class Gradients:
    """Those of some parameters; what had to be made of them is held until the step is taken.

    Args:
        base: names the parameters.
        sharded: whether some are DTensors.
    """

    def __init__(self, base: Optimizer, sharded: bool) -> None:
        self._base, self._sharded = base, sharded
        self._spread: dict[int, Tensor] = {}  # those that came spread otherwise than their weights, by id
        self._copies: list[Tensor] = []  # those that were laid out like their weights

    def let_go(self) -> None:
        """Of what is only held during a step."""
        self._copies.clear()
        self._spread.clear()

    def of(self, p: Tensor, grad: Tensor) -> Tensor:
        """A parameter's gradient, spread as the parameter is."""
        return self._spread.get(id(p), grad)

    def all_of(self, members: Sequence[Tensor]) -> list[Tensor]:
        """Those of some parameters, spread as these are."""
        grads: list[Tensor] = [p.grad for p in members]  # type: ignore[misc]
        if self._spread:
            grads = [self._spread.get(id(p), g) for p, g in zip(members, grads, strict=True)]
        return grads

    def spread(self, parameters: Sequence[Tensor], grads: Sequence[Any]) -> list[Any]:
        """Spread those otherwise that are not spread as their weights are.

        Before anything else, and once: all processes take part.
        """
        found = list(grads)
        for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
            spec = getattr(p, "_spec", None)
            if spec is not None and getattr(g, "_spec", None) is not spec:
                name = parameter_names(self._base)[id(p)]
                found[i] = spread_as(g, p, name, "its gradient")
                if found[i] is not g:
                    self._spread[id(p)] = found[i]
        return found

    def laid_out(self, members: Sequence[Tensor]) -> list[Tensor]:
        """In their weights' memory order.

        Raises:
            RuntimeError: one has another shape.
        """
        grads = self.all_of(members)
        if self._sharded:
            grads, members = list(map(here, grads)), list(map(here, members))
        laid_out = [_like(g, p) for g, p in zip(grads, members, strict=True)]
        # Only the copies: a gradient kept here would outlive zero_grad().
        self._copies += [new for new, g in zip(laid_out, grads, strict=True) if new is not g]
        return laid_out


def _like(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in its weight's memory order; itself where it is already."""
    if g.shape != p.shape:  # copy_ would broadcast it; looked at again when the tables are made anew
        raise RuntimeError("the gradient has another shape")
    lazy = g.is_neg() or g.is_conj() or g._is_zerotensor()  # pyright: ignore
    if not lazy and ((g.is_contiguous() and p.is_contiguous()) or g.stride() == p.stride()):
        return g
    return torch.empty_like(p, dtype=g.dtype, requires_grad=False).copy_(g)
