"""Deltas for the tests of ComPEFT, and the algorithm written down again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import optx
from optx import ComPEFT, Compressed

V = torch.tensor([0.5, -0.1, 0.2, -0.9, 0.05, 0.3, -0.4, 0.7, -0.6, 0.15])
SIGMA = 0.498219
State = dict[str, Tensor]


def between(tuned: State, base: State | None = None) -> optx.Delta:
    zeros = {n: torch.zeros_like(t) if t.is_floating_point() else t for n, t in tuned.items()}
    return optx.Delta.between(base or zeros, tuned)


def compressed(v: Tensor, **options: Any) -> Compressed:
    return optx.compress(between({"w": v}), ComPEFT(**options))


def flat(state: State) -> Tensor:
    return torch.cat([state[n].flatten().float() for n in sorted(state) if state[n].is_floating_point()])


def reference(delta: State, density: float, alpha: float, repo: bool = False) -> Tensor:
    """The algorithm as the paper has it, on one flat vector."""
    v = flat(delta)
    scale = torch.tensor(alpha * float(np.float32(v.double().std())), dtype=torch.float64).float()
    if repo:
        threshold = v.abs().kthvalue(len(v) - int(len(v) * density)).values
        return torch.where(v.abs() >= threshold, v.sign() * scale, 0.0)
    order = torch.sort(v.abs(), descending=True, stable=True).indices[: max(1, int(density * len(v)))]
    return torch.zeros_like(v).index_put_((order,), v[order].sign() * scale)


def random_state(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}
