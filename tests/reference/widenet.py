"""WideNet's mixture by hand: token after token, in queues of limited length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mixed(
    x: Tensor, scores: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], k: int, limit: int | None
) -> tuple[Tensor, list[list[int]]]:
    """The sum over each token's k likeliest experts, and who was taken by which."""
    chances = scores.softmax(-1)
    taken: list[list[int]] = [[] for _ in experts]
    out = []
    for token, p in zip(range(len(x)), chances, strict=True):
        y = torch.zeros_like(experts[0](x[token]))
        for e in p.topk(k).indices.tolist():
            if limit is None or len(taken[e]) < limit:
                taken[e].append(token)
                y = y + p[e] * experts[e](x[token])
        out.append(y)
    return torch.stack(out), taken
