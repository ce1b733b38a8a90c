"""Golomb codes of ternary masks: positions of the nonzeros by the gaps between them, and their signs.

A gap g is coded with a divisor m: ``g // m`` ones, a zero, then the remainder. m is a power of two, as in
Rice's codes, or three times one, which is up to 1.2 % shorter (at a density of 0.2: 0.928 bits per number
instead of 0.939). Between densities of 0.34 and 0.42 no gap code comes within 2 % of the entropy: there four
positions at a time have a Huffman code of 3 to 6 bits (``LENGTHS`` in `kernels/ternary/golomb_loops.py`).
Each block of 131,072 numbers has the code that is shortest for it; where more is kept than not, the positions
of what is *not* kept are coded. Blocks are decoded in parallel.

One tensor's payload, little-endian: per block a uint32 (code in the upper byte, number of nonzeros below),
per block a uint16 (words of its stream), the streams in words of 32 bits, lowest bit first: signs (1 is
negative), then positions. A code's lower five bits are the number of plain bits; 32: times three; 64: not
kept; 128: four at a time (with 64 at most).

Source: Golomb 1966; Rice 1979; Sattler et al., arXiv 1903.02891, which ComPEFT, arXiv 2311.13171, follows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_GOLDEN = (1 + math.sqrt(5)) / 2


def entropy(density: float) -> float:
    """Bits per number that a random ternary mask of this density takes at least: H_b(density) + density.

    Example:
        >>> round(entropy(0.2), 6)
        0.921928
    """
    if density in (0.0, 1.0):
        return density
    rest = 1 - density
    return -rest * math.log2(rest) - density * math.log2(density / 2)


def rice_parameter(density: float) -> int:
    """b*, the best number of plain bits in a Rice code for a random mask of this density.

    Example:
        >>> [rice_parameter(p) for p in (0.05, 0.1, 0.2, 0.3, 0.5)]
        [4, 3, 2, 1, 0]
    """
    if density >= 1:
        return 0
    return max(0, 1 + math.floor(math.log2(math.log(_GOLDEN - 1) / math.log1p(-density))))


def rice_bits(density: float) -> float:
    """Bits per number of a random mask of this density in a Rice code with b*, signs included.

    Example:
        >>> round(rice_bits(0.2), 6)
        0.938753
    """
    b = rice_parameter(density)
    return density * (b + 1 / (1 - (1 - density) ** 2**b) + 1)


def layout(masks: Tensor, numel: int) -> tuple[Tensor, int]:
    """What `encode` will write: its table of blocks, and the bytes in all."""
    from optx.kernels.ternary import cpu as ternary_cpu

    table = ternary_cpu.measure(masks.cpu(), numel) if numel else torch.empty(0, 3, dtype=torch.int64)
    return table, 6 * len(table) + 4 * int(_starts(table)[-1])


def encode(masks: Tensor, numel: int) -> bytes:
    """The payload of one tensor's masks.

    Args:
        masks: int64 (2, words).
        numel: of the tensor.
    """
    from optx.kernels.ternary import cpu as ternary_cpu

    if numel == 0:
        return b""
    masks = masks.cpu()
    table, _ = layout(masks, numel)
    starts = _starts(table)
    stream = ternary_cpu.encode(masks, numel, table, starts)
    head = (table[:, 1] << 24 | table[:, 0]).numpy().astype("<u4").tobytes()
    sizes = starts.diff().numpy().astype("<u2").tobytes()
    return head + sizes + stream.numpy().astype("<i4", copy=False).tobytes()


def decode(payload: bytes, numel: int) -> Tensor:
    """The masks of a payload.

    Raises:
        ValueError: it is none of a tensor of so many numbers.
    """
    from optx.kernels.ternary import cpu as ternary_cpu

    blocks = -(-numel // ternary_cpu.SPAN)
    if len(payload) < 6 * blocks:
        raise ValueError("it is too short")
    head = np.frombuffer(payload, "<u4", blocks).astype(np.int64)
    sizes = np.frombuffer(payload, "<u2", blocks, 4 * blocks).astype(np.int64)
    stream = np.frombuffer(payload, "<i4", -1 if len(payload) > 6 * blocks else 0, 6 * blocks)
    codes = head >> 24
    fours = (codes & ternary_cpu.FOURS) != 0
    known = np.where(fours, codes & ~192 == 0, (codes & 31) <= 16)
    if sizes.sum() != stream.size or not known.all():
        raise ValueError("its table of blocks makes no sense")
    if not blocks:
        return torch.empty(2, 0, dtype=torch.int64)
    table = torch.from_numpy(np.stack([head & 0xFFFFFF, codes, np.zeros_like(head)], axis=1))
    starts = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))
    masks = ternary_cpu.decode(numel, table, starts, torch.from_numpy(stream.astype(np.int32)))
    if masks is None:
        raise ValueError("a block makes no sense")
    return masks


def _starts(table: Tensor) -> Tensor:
    """First word of each block's stream, and of what would follow the last."""
    length = (table[:, 0] + table[:, 2] + 31) // 32
    return torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
