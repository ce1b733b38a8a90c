"""Samples cut out of a backward pass: with a loss that is not finite, weight 0 is not enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Hook = Callable[[Sequence["Tensor | None"], Sequence["Tensor | None"]], "tuple[Tensor | None, ...]"]


def leave_out(losses: Tensor, samples: Tensor) -> None:
    """Give samples no gradient in anything that their losses were computed from.

    A gradient of 0 times a slope that is not finite is nan, and one matrix product further down it is in
    every weight. So whatever nan the backward pass makes in these samples' rows is set to 0 where it arises;
    numbers of other samples, and those that are finite, are not touched. The hooks live as long as the graph.

    Args:
        losses: one per sample, shape (B,).
        samples: which, bool, shape (B,). Tensors on the way have B, or a multiple of it, in their first
            dimension, sample by sample; others stay as they are.
    """
    if len(samples) == 0:
        return
    seen: set[Any] = set()
    waiting: list[Any] = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        behind = [one for one, _ in node.next_functions]
        if behind:  # else it is where a parameter's gradient is added up
            node.register_hook(
                _zeroed(samples, [one is not None and bool(one.next_functions) for one in behind])
            )
        waiting += behind


def _zeroed(samples: Tensor, inner: list[bool]) -> Hook:
    """A hook on a node's gradients; those that go straight into a parameter are left alone."""

    def hook(gradients: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(
            _cleared(gradient, samples) if gradient is not None and goes_on else gradient
            for gradient, goes_on in zip(gradients, inner, strict=True)
        )

    return hook


def _cleared(gradient: Tensor, samples: Tensor) -> Tensor:
    if gradient.ndim == 0 or gradient.numel() == 0 or gradient.shape[0] % len(samples):
        return gradient
    rows = gradient.reshape(len(samples), -1)
    return torch.where(samples[:, None] & ~rows.isfinite(), 0.0, rows).view_as(gradient)
