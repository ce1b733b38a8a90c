"""How a param group's state is kept, in words and bytes, for `Wrapped.plan`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optx.step.bases import base_rules
from optx.step.kept import MASTER, STATE, moments_of, state_words
from optx.step.moments import float_of, scale_shape, takes_codes
from optx.step.transform import Group, Host


def kept_words(wrapped: Host, group: Group) -> str:
    """What is kept in how many bits, and how many bytes that takes; nothing where nothing was asked for."""
    bits, master = group.get(STATE), group.get(MASTER)
    if bits is None and master is None:
        return ""
    moments = moments_of(base_rules(wrapped.base, group), wrapped.transforms, group)
    params: list[Tensor] = [p for p in group["params"] if p.numel()]
    size = sum(
        len(moments) * _moment_bytes(p, bits) + p.numel() * {24: 1, 32: 2}.get(master or 0, 0) for p in params
    )
    words: list[str] = []
    if bits is not None:
        words.append(f"{', '.join(moments)} in {state_words(bits)}")
        double = [p for p in params if p.dtype == torch.float64]
        whole = [p for p in params if bits == 8 and not takes_codes(p) and p.dtype != torch.float64]
        for some, kind in (
            (double, "float64, as they are"),
            (whole, "float32 (their order in memory, or shards)"),
        ):
            if some:
                count, tensors = sum(p.numel() for p in some), f"{len(some)} tensor{'s' * (len(some) > 1)}"
                words.append(f"{count:,} numbers of {tensors} in {kind}")
    if master is not None:
        words.append(f"weights of {master} bits, 16 of them in the model")
    numbers = sum(p.numel() for p in params)
    return f"{'; '.join(words)}: {size / max(numbers, 1):.2f} bytes of state a number"


def _moment_bytes(p: Tensor, bits: int | None) -> float:
    if bits == 8 and takes_codes(p):
        return p.numel() + 2 * math.prod(scale_shape(p.shape))
    return p.numel() * (float_of(p, bits) or p.dtype).itemsize
