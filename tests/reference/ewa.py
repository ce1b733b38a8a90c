"""EWA by hand, as slow and plain as can be: the partition of tokens, the averaging, the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def averaged(experts: Sequence[float], beta: float, rule: str = "others") -> list[float]:
    """Step 3 for scalars, from the old values."""
    count = len(experts)
    if rule == "mean":
        return [(1 - beta) * w + beta * sum(experts) / count for w in experts]
    return [(1 - beta) * w + beta / (count - 1) * (sum(experts) - w) for w in experts]


def dealt(x: Tensor, order: Sequence[int], experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Tokens one by one: the first M mod N experts have one more."""
    tokens = list(x.reshape(-1, x.shape[-1]))
    made: dict[int, Tensor] = {}
    start = 0
    for i, expert in enumerate(experts):
        size = len(tokens) // len(experts) + (i < len(tokens) % len(experts))
        for token in order[start : start + size]:
            made[token] = expert(tokens[token][None])[0]
        start += size
    return torch.stack([made[i] for i in range(len(tokens))]).view(*x.shape[:-1], -1)
