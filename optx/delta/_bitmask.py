"""Ternary vectors as two bit masks, +1s and -1s, and what can be done with them as they are.

Masks are int64 of shape (2, ceil(n / 64)): number i is bit ``i % 64`` of word ``i // 64``; bits past the last
are 0. On the CPU they are worked on by `optx.kernels.ternary.cpu`, on a GPU by its `dense_triton`.

Source: ComPEFT, arXiv 2311.13171, section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optx.delta._float32_sums import narrow, wide
from optx.kernels.available import why_unavailable

DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that the kernels write."""


class Overlap(NamedTuple):
    """How two ternary vectors meet, in numbers of positions.

    Args:
        a: nonzeros of the first.
        b: nonzeros of the second.
        agree: both nonzero, of the same sign.
        clash: both nonzero, of opposite signs.
    """

    a: int
    b: int
    agree: int
    clash: int


def words(numel: int) -> int:
    """Words of a mask."""
    return -(-numel // 64)


def overlap(a: Tensor, b: Tensor) -> Overlap:
    """How two vectors of the same length meet; exact."""
    from optx.kernels.ternary import cpu as ternary_cpu

    return Overlap(*ternary_cpu.overlap(a.cpu(), b.cpu()))


def dense(masks: Tensor, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """``scale * t`` as a tensor, on the masks' device."""
    device = masks.device
    made = torch.empty(shape, dtype=dtype if dtype in DENSE else torch.float32, device=device)
    if made.numel() == 0:
        return made.to(dtype)
    if device.type == "cuda" and why_unavailable("triton") is None:
        from optx.kernels.ternary import dense_triton as ternary

        ternary.fill(made, masks, scale)
        return made.to(dtype)
    from optx.kernels.ternary import cpu as ternary_cpu

    if device.type == "cpu":
        ternary_cpu.fill(made, masks, scale)
        return made.to(dtype)
    return dense(masks.cpu(), shape, dtype, scale).to(device)


def add_to(tensor: Tensor, masks: Tensor, scale: float) -> None:
    """``tensor += scale * t`` in place: summed in float32 (float64 for such), rounded once."""
    if tensor.numel() == 0:
        return
    device = tensor.device.type
    served = device == "cpu" or (device == "cuda" and why_unavailable("triton") is None)
    if tensor.is_contiguous() and tensor.dtype in DENSE and served:
        masks = masks.to(tensor.device)
        if device == "cuda":
            from optx.kernels.ternary import dense_triton as ternary

            ternary.add(tensor, masks, scale)
        else:
            from optx.kernels.ternary import cpu as ternary_cpu

            ternary_cpu.add(tensor, masks, scale)
        torch.autograd.graph.increment_version(tensor)  # the kernels write behind autograd's back
        return
    sum_dtype = wide(tensor.dtype)
    change = dense(masks.cpu(), tuple(tensor.shape), sum_dtype, scale).to(tensor.device)
    tensor.copy_(narrow(tensor.to(sum_dtype).add_(change), tensor.dtype))
