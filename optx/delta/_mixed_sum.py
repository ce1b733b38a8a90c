"""Hashes of whole tensors at the speed of memory: of any pieces, in any order, by several threads.

A tensor's hash is the sum, modulo 2**64, of its numbers' bits, each mixed with its place. It tells one
checkpoint from another by every number of it; it is no defence against someone who makes up numbers to fit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx.kernels.available import why_unavailable

MASK = (1 << 64) - 1
"""Sums are modulo one more."""
_STEP, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 16


@functools.cache
def _compiled() -> ModuleType:
    from optx.kernels.generated import load_module, source

    return load_module("delta_mixed_sum", source("optx.delta", "_mixed_sum_loops.py"))


def mixed_sum(flat: Tensor, begin: int) -> int:
    """Of a flat piece whose first number has this place in its tensor."""
    size = flat.element_size()
    plain = flat.detach().cpu().contiguous()
    bits: Any = plain.view(torch.uint8).numpy().view(f"u{size}") if len(flat) else np.empty(0, np.uint8)
    if why_unavailable("numba") is None:
        return int(_compiled().mixed_sum(bits, np.uint64(begin)))
    return sum(_by_numpy(bits[at : at + _CHUNK], begin + at) for at in range(0, len(bits), _CHUNK)) & MASK


def _by_numpy(bits: Any, begin: int) -> int:
    """What the compiled loop gives."""
    place = np.arange(begin, begin + len(bits), dtype=np.uint64)
    z = (place * np.uint64(_STEP)) ^ bits.astype(np.uint64)
    for shift, multiplier in _MIX:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


class AllOf:
    """Tensors whose content is a part of a plan: its text, made when asked for, is a hash of every number.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __repr__(self) -> str:
        made = hashlib.blake2b(digest_size=16)
        for name, tensor in self._tensors.items():
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
            made.update(repr((name, tuple(tensor.shape), tensor.dtype, mixed_sum(flat, 0))).encode())
        return made.hexdigest()
