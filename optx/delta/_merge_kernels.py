"""Merging methods of mergekit's that take a tensor by pieces: sums, and interpolation on a sphere.

Each computes what mergekit 0.1.5 computes, in the same order and dtype, so that the numbers are the same.

Source: model soups, arXiv 2203.05482 (linear); K. Shoemake, "Animating Rotation with Quaternion Curves",
SIGGRAPH 1985 (slerp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.delta._merge_group import Group, Made, pieces_of

_PARALLEL = 0.9995  # of the cosine: beyond it the arc is taken for a line
_SHORT = 1e-8  # a norm that is not divided by


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def passthrough(group: Group) -> Made:
    """The one model's tensor, perhaps scaled."""
    scale = group.each[0]["scale"]
    return lambda begin, end: (
        group.piece(0, begin, end) if scale is None else group.piece(0, begin, end) * scale
    )


def linear(group: Group) -> Made:
    """Weighted mean, or sum, of all models."""
    dtype = wide(group.dtype)
    weights = torch.tensor([[own["weight"] for own in group.each]], dtype=dtype)
    mass = weights.sum(dim=1) if group.shared["normalize"] else None
    if mass is not None and not float(mass):
        raise OptxError(f"linear: the weights of {group.name!r} add up to 0; or is normalize: false meant?")

    def piece(begin: int, end: int) -> Tensor:
        summed = torch.zeros(end - begin, dtype=dtype)
        for i, weight in enumerate(weights.unbind(1)):
            summed.addcmul_(group.piece(i, begin, end), weight)
        if mass is not None:
            summed.div_(mass)
        return summed.to(group.dtype)

    return piece


def slerp(group: Group) -> Made:
    """From the base to the other along the arc between them; a line where they are nearly parallel."""
    [other], dtype = group.others, wide(group.dtype)
    t = torch.tensor([[group.shared["t"]]], dtype=dtype)

    def pair(begin: int, end: int) -> tuple[Tensor, Tensor]:
        return group.of_base(begin, end).to(dtype)[None], group.piece(other, begin, end).to(dtype)[None]

    places = pieces_of(group.entry.numel)
    if not places:
        return group.whole(other).clone()
    parts = [[torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in pair(*place)] for place in places]
    norms = [torch.linalg.vector_norm(torch.stack(own), dim=0) for own in zip(*parts, strict=True)]
    norm_a, norm_b = (torch.where(norm > _SHORT, norm, 1) for norm in norms)
    dots = list[Tensor]()
    for place in places:
        a, b = pair(*place)
        dots.append(((a / norm_a) * (b / norm_b)).sum(dim=1, keepdim=True))
    dot = torch.stack(dots).sum(dim=0).clamp(-1, 1)
    near = dot.abs() > _PARALLEL
    angle = torch.acos(torch.where(near, 0, dot))
    of_a = torch.where(near, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    of_b = torch.where(near, t, torch.sin(t * angle) / torch.sin(angle))

    def piece(begin: int, end: int) -> Tensor:
        a, b = pair(begin, end)
        return (of_a * a + of_b * b)[0].to(group.dtype)

    return piece


def nearswap(group: Group) -> Made:
    """The base, moved to the other where they differ by less than t or little more."""
    [other], t = group.others, group.shared["t"]

    def piece(begin: int, end: int) -> Tensor:
        a, b = group.of_base(begin, end), group.piece(other, begin, end)
        share = (t / (a - b).abs().clamp(min=1e-6)).clamp(min=0, max=1)
        return share * b + (1 - share) * a

    return piece
