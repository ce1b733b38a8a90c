"""Nets that LDLT serves, besides plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.ELU(),
        nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.LeakyReLU(0.1),
        nn.Linear(5, 3),
    )


class Skip(nn.Module):
    def __init__(self, skip: bool, deep: bool = False, act: Any = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        out = 3 if skip else 4
        self.fc1, self.fc2 = nn.Linear(4, 7), nn.Linear(7, 7) if deep else nn.Identity()
        self.out = nn.Linear(7, out)
        self.skip = nn.Linear(4, out) if skip else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        if isinstance(self.fc2, nn.Linear):
            h = self.act(self.fc2(h))
        return self.out(h) + self.skip(x)
