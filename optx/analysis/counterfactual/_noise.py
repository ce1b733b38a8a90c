"""Gaussian noise that a seed fixes, whatever the batch and the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, as_whole, shown

_BLOCK = 1024  # samples that are drawn at a time: part of what a seed means


def generator_of(who: str, generator: Any) -> torch.Generator:
    """The one that is given, or a new one with this seed."""
    if isinstance(generator, torch.Generator):
        return generator
    seed = as_whole(generator)
    if seed is None:
        raise OptxError(f"{who}: generator is {shown(generator)}; it must be a torch.Generator or a seed.")
    return torch.Generator().manual_seed(seed)


def drawn(generator: torch.Generator, k: int, sigma: float, like: Tensor) -> Iterator[Tensor]:
    """N(0, sigma^2) in blocks of up to 1024 samples, k in all; each is for every row of ``like``."""
    for start in range(0, k, _BLOCK):
        shape = (min(_BLOCK, k - start), *like.shape[1:])
        # Drawn in float32 always, so that a seed means the same in every dtype.
        noise = torch.randn(shape, generator=generator, device=generator.device)
        yield (sigma * noise).to(like.device, like.dtype)
