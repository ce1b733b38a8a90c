"""Writing a float32 result into a low-precision weight, on torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx._names import is_dtensor


def write(p: Tensor, value: Tensor, stochastic: bool, seed: int) -> None:
    """``p.copy_(value)``, rounded stochastically if ``p`` is bfloat16 and that is wanted.

    A change smaller than half a unit in the last place survives on average, where copy_ would lose it.
    """
    if not (stochastic and p.dtype == torch.bfloat16 and value.dtype == torch.float32):
        p.copy_(value)
        return
    target, source = (t.to_local() if is_dtensor(t) else t for t in (p, value))  # type: ignore[attr-defined]
    if number := shard_number(p):
        seed = abs(seed ^ step_key(0, 0, number))
    generator = torch.Generator(device=source.device).manual_seed(seed)
    dither = torch.randint(
        0, 1 << 16, source.shape, generator=generator, device=source.device, dtype=torch.int32
    )
    bits = source.contiguous().view(torch.int32)
    rounded = ((bits + dither) & ~0xFFFF).view(torch.float32)
    target.copy_(torch.where(source.isfinite(), rounded, source))


def step_key(seed: int, step: int, part: int = 0) -> int:
    """A key for one step's random draws, as a signed 64-bit number."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part * 0x94D049BB133111EB) % (1 << 64)
    x = ((x ^ (x >> 31)) * 0xD6E8FEB86659FD93) % (1 << 64)
    x ^= x >> 32
    return x - (1 << 64) if x >= 1 << 63 else x


def shard_number(p: Tensor) -> int:
    """Which of a DTensor's shards lies in this process, from 0; its replicas have the same number."""
    if not is_dtensor(p):
        return 0
    spread: Any = p
    mesh, number = spread.device_mesh, 0
    for dim, placement in enumerate(spread.placements):
        if type(placement).__name__ != "Replicate":
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number
