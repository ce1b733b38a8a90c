"""DSP-Reg (arXiv 2601.19394, as optx reads it), from the whole stack of gradients, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference.torch_bases import adam_moments, adam_move, sgd


def normalised(s: Sequence[Tensor], norm: str, eps: float = 1e-12) -> list[Tensor]:
    """S^ of all tensors."""
    if norm == "none":
        return [x.clone() for x in s]
    if norm == "layer":
        return [x / (x.mean() + eps) for x in s]
    flat = torch.cat([x.reshape(-1) for x in s])
    return [x / ((flat.mean() if norm == "mean" else flat.max()) + eps) for x in s]


class DSPReference:
    """An optimizer whose every weight is regularised.

    Args:
        weights: copied.
        base: ``sgd``, ``adam`` or ``adamw``; what it is given in ``numbers``.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        base: str,
        numbers: dict[str, Any],
        weight: float = 1.0,
        ema: float = 0.9,
        norm: str = "mean",
        warmup: int = 0,
        decoupled: bool = False,
        anchored: bool = False,
        unbiased: bool = False,
    ) -> None:
        self.weights = [w.detach().double().clone() for w in weights]
        self.anchors = [w.clone() if anchored else torch.zeros_like(w) for w in self.weights]
        self.base, self.numbers = base, dict(numbers, decoupled=base == "adamw")
        self.options = weight, ema, norm, warmup, decoupled, unbiased
        self.states: list[dict[str, Any]] = [{} for _ in weights]
        self.s: list[Tensor] = []
        self.steps = 0

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """One step on gradients by domain, then by weight."""
        weight, ema, norm, warmup, decoupled, unbiased = self.options
        by_weight = zip(*gradients, strict=True)
        stacks = [torch.stack([d.detach().double() for d in of_one]) for of_one in by_weight]
        new = [stack.var(0, unbiased=unbiased) for stack in stacks]
        self.s = [ema * a + (1 - ema) * b for a, b in zip(self.s, new, strict=True)] if self.s else new
        rate = weight if self.steps >= warmup else 0.0
        lr = self.numbers["lr"]
        for i, scaled in enumerate(normalised(self.s, norm)):
            w, away = self.weights[i], self.weights[i] - self.anchors[i]
            g = stacks[i].mean(0) + (0.0 if decoupled else rate * scaled * away)
            w = self._base(w, g, self.states[i])
            if decoupled:
                w = w - (lr * rate * scaled).clamp(max=1.0) * (w - self.anchors[i])
            self.weights[i] = w
        self.steps += 1

    def _base(self, w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        if self.base == "sgd":
            return sgd(w, g, state, self.numbers)
        return adam_move(w, adam_moments(w, g, state, self.numbers), state, self.numbers)
