"""Moments in 8 bits, and weights in two parts: how numbers are kept, on tensors.

A moment is taken in groups of 32 numbers, in the order in which its weight lies in memory; the last group of
a tensor may be shorter. A group has a scale s in bfloat16, its largest magnitude rounded up, and a code per
number ("FlashOptim", https://arxiv.org/abs/2602.23349, whose scales are float16 and end at 6e-8):

- *signed*: x is kept as ``round(127 * phi(x / s))`` in int8, with ``phi(y) = 2 y / (1 + |y|)``: half of the
  codes are for magnitudes below a third of the largest.
- *nonnegative*: r = sqrt(x), and ``round(255 * r / s)`` in uint8, s being the scale of the roots. What is
  not 0 keeps at least code 1: an update is divided by it.

A step rounds codes stochastically: at beta2 = 0.999 a second moment falls by an eighth of a code in a step at
most, and rounded to nearest it would never fall. `encode`, for what is converted, rounds to nearest. A group
whose largest magnitude is below 2**-126 is kept as zeros; from 2**126 on, or with inf or nan in it, as nan.
On a CPU a step reads codes off the bits of a sum, for which levels are shrunk by 2**-17 (signed) or 2**-20: a
number on the edge of two codes may get the other one than on a GPU.

A weight in two parts is the nearest bfloat16 (halves away from 0) and a rest: the lower bits of the float32
as a signed number, 16 of them (nothing is lost), or the upper 8 of those (15 bits after the point are kept).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx.kernels.step.layout import GROUP

_SMALLEST, _LARGEST = 0x00800000, 0x7E800000
CODES = {"signed": torch.int8, "nonnegative": torch.uint8}
CODED = tuple(CODES.values())


def encode(x: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    """Codes of x's shape, and a scale per group.

    Args:
        x: any float dtype, contiguous; taken in float32.
        moment: ``"signed"`` or ``"nonnegative"``.

    Returns:
        int8 or uint8 of x's shape; bfloat16 of (groups,).
    """
    values = in_groups(x.detach())
    if moment == "nonnegative":
        values = values.sqrt()
    largest = values.abs().view(torch.int32).amax(1, keepdim=True) if len(values) else values.int()[:, :1]
    scale, plain = _scale(largest)
    safe = torch.where(plain, scale, 1.0)
    if moment == "signed":
        values = values * (1.0 / safe)
        level = values * reciprocal(1.0 + values.abs()) * 254.0
    else:
        level = torch.maximum(values * (255.0 / safe), (values > 0).float())
    codes = torch.where(plain, level.round(), 0.0).to(CODES[moment])
    return out_of_groups(codes, x.shape), scale.view(-1).to(torch.bfloat16)


def _scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Scales from the bits of groups' largest magnitudes, and whether they are plain: neither 0 nor nan."""
    above = (largest + 0xFFFF) & -0x10000
    low, high = largest < _SMALLEST, largest >= _LARGEST
    bits = torch.where(low, 0, torch.where(high, 0x7FC00000, above)).to(torch.int32)
    return bits.view(torch.float32), ~(low | high)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers that codes and scales stand for.

    Args:
        codes: int8 (signed) or uint8 (nonnegative), contiguous.
        scale: one per group, in any shape.
    """
    q = in_groups(codes)
    s = scale.reshape(-1, 1).to(torch.float32)
    if codes.dtype == torch.uint8:
        root = q * (s * (1 / 255))
        values = root * root
    else:
        values = q * reciprocal(2.0 - q.abs() * (1 / 127)) * (s * (1 / 127))
    return out_of_groups(values, codes.shape)


def in_groups(x: Tensor) -> Tensor:
    """Numbers in float32, a group a row; the last one is filled up with 0."""
    flat = x.to(torch.float32).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)


def out_of_groups(values: Tensor, shape: torch.Size) -> Tensor:
    """What belongs to so many numbers of rows of groups, in their shape."""
    return values.view(-1)[: shape.numel()].view(shape)


def reciprocal(u: Tensor) -> Tensor:
    """1 / u, to 3e-6, for u from 1 to 2, in products and sums that are the same in every kernel.

    The polynomial whose error is the fourth Chebyshev polynomial's, and one step of Newton's method.
    """
    p = ((-0.22183709 * u + 1.33102253) * u - 2.93934142) * u + 2.82842288
    return p * (2.0 - u * p)


def split(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A float32 as a bfloat16 and a rest of 8 or 16 bits (int8, int16)."""
    dropped = 16 - bits
    whole = torch.where(x.isnan(), torch.nan, x.to(torch.float32)).view(torch.int32).to(torch.int64)
    if dropped:
        whole = (whole + (1 << (dropped - 1))) >> dropped << dropped
    half = (whole + 0x8000) >> 16
    rest = (whole - (half << 16)) >> dropped
    return half.to(torch.int16).view(torch.bfloat16), rest.to(torch.int8 if bits == 8 else torch.int16)


def joined_rest(rest: Tensor, dtype: torch.dtype) -> Tensor:
    """A rest in more bits, or in fewer, where the weight stays as it is."""
    if dtype == torch.int16:
        return rest.to(dtype) << 8
    return ((rest.to(torch.int32) + 128) >> 8).clamp_max(127).to(dtype)


def joined(half: Tensor, rest: Tensor) -> Tensor:
    """The float32 that a bfloat16 and its rest are.

    Of a weight that was set to 0 since, or to anything else, the rest moves it by half a unit at most.
    """
    bits = half.view(torch.int16).to(torch.int32) << 16
    low = rest.to(torch.int32) << (16 - 8 * rest.element_size())
    size = ((bits & 0x7FFFFFFF) + low).clamp_min(0)
    return (size | (bits & -0x80000000)).view(torch.float32)
