"""Checkpoints for the tests of deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state(seed: int, count: int = 4, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    tensors = {f"layer.{i}.weight": normal(50, 40, seed=seed + i).to(dtype) for i in range(count)}
    return {**tensors, "steps": torch.tensor([seed])}


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
