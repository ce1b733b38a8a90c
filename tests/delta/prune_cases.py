"""A base, what it became, and a model that has it."""

from __future__ import annotations

import torch
from delta_cases import normal
from torch import Tensor, nn

F32 = torch.float32


def pair(dtype: torch.dtype = F32, rows: int = 40, columns: int = 50) -> tuple[dict[str, Tensor], ...]:
    base = {"a.weight": normal(rows, columns, dtype=dtype), "a.bias": normal(rows, seed=1, dtype=dtype)}
    tuned = {name: t + normal(*t.shape, seed=2).to(dtype) / 8 for name, t in base.items()}
    return base, tuned


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(50, 40)
        self.a.load_state_dict({name[2:]: t for name, t in pair()[1].items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)
