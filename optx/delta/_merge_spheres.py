"""mergekit's methods on a sphere that look at a whole tensor of every model at once.

Each computes what mergekit 0.1.5 computes, in the same order and dtype.

Source: mergekit (nuslerp, multislerp), which names no paper; Karcher means of models, arXiv 2603.04972.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.delta._merge_group import Group, Made
from optx.delta._merge_kernels import wide


def nuslerp(group: Group) -> Made:
    """Along the arc between two models, or between two changes of a base."""
    weights = group.values("weight")
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    one, other = (group.whole(i) for i in group.others)
    base = None if group.base is None else group.whole(group.base)
    if base is not None:
        one, other = one - base, other - base
    flatten, across = group.shared["nuslerp_flatten"], group.shared["nuslerp_row_wise"]
    if flatten:
        one, other = one.reshape(-1), other.reshape(-1)
    elif across:
        one, other = one.transpose(0, -1), other.transpose(0, -1)
    turned = _arc(one, other, t)
    turned = (turned.transpose(0, -1) if across and not flatten else turned).reshape(group.shape)
    return turned if base is None else base + turned


def _arc(one: Tensor, other: Tensor, t: float) -> Tensor:
    a, b = (x / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-7) for x in (one, other))
    cosine = torch.sum(a * b, dim=-1, keepdim=True).clamp(-1, 1)
    line = (1 - cosine.square()) <= 1e-16
    angle = torch.acos(torch.where(line, 0, cosine))
    arc = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)
    return torch.where(line, (1 - t) * one + t * other, arc)


def multislerp(group: Group) -> Made:
    """From the models' mean direction, a step in the plane that touches the sphere, and back to it."""
    places = group.others
    if len(places) == 1:
        return group.whole(places[0]).clone()
    base = None if group.base is None else group.whole(group.base)
    points = torch.stack([group.whole(i) for i in places])
    points = (points if base is None else points - base).view(len(places), -1)
    weights = torch.tensor(group.values("weight"), dtype=group.dtype)
    if group.shared["normalize_weights"]:
        weights = weights / weights.sum()
    turned = _by_tangents(group, points, weights[:, None]).view(group.shape)
    return turned if base is None else turned + base


def _by_tangents(group: Group, points: Tensor, weights: Tensor) -> Tensor:
    tiny = group.shared["eps"]
    norms = torch.norm(points, dim=-1, keepdim=True)
    units = points / (norms + tiny)
    mean = (units * weights).sum(0)
    size = torch.norm(mean)
    if size < tiny:
        if len(points) == 2:
            return points[0] * weights[0] + points[1] * weights[1]
        raise OptxError(
            f"multislerp: the models' directions cancel out in {group.name!r}; give other weights, or "
            f"another method."
        )
    mean = mean / size
    tangents = units - (units * mean).sum(-1, keepdim=True) * mean
    step = (tangents * weights).sum(0)
    angle = torch.norm(step) + tiny
    there = mean * torch.cos(angle) + step * (torch.sin(angle) / angle)
    return there * (norms * weights).sum()


def karcher(group: Group) -> Made:
    """The direction with the smallest squared angles to all models', and their mean length."""
    count, tol = len(group.readers), group.shared["tol"]
    tensors = [group.whole(i) for i in range(count)]
    if count == 1:
        return tensors[0].clone()
    dtype = wide(group.dtype)
    norms = [torch.linalg.vector_norm(tensor.to(dtype)) for tensor in tensors]
    valid = [i for i in range(count) if float(norms[i]) > tol]
    if not valid:
        return torch.zeros_like(tensors[0])
    units = [(tensors[i] / norms[i]).to(group.dtype) for i in valid]
    share = 1.0 / count
    share /= sum([share] * len(valid))
    mean = torch.zeros_like(units[0])
    for unit in units:
        mean += share * unit
    size = torch.linalg.vector_norm(mean.to(dtype))
    mean = units[0].clone() if float(size) < tol else (mean / size).to(group.dtype)
    for _ in range(group.shared["max_iter"]):
        moved = _step(mean, units, share, tol, dtype)
        if moved is None:
            break
        mean = moved
    return sum((norm * (1.0 / count) for norm in norms[1:]), 0 + norms[0] * (1.0 / count)) * mean


def _step(mean: Tensor, units: list[Tensor], share: float, tol: float, dtype: torch.dtype) -> Tensor | None:
    """The mean, moved by the mean of what lies between it and the others; None once that is nothing."""
    tangent = torch.zeros_like(mean)
    for unit in units:
        cosine = torch.dot(mean.flatten(), unit.flatten()).clamp(-1.0, 1.0)
        angle = torch.arccos(cosine)
        if float(angle) >= tol:
            tangent += share * (angle / torch.sin(angle)) * (unit - cosine * mean)
    size = torch.linalg.vector_norm(tangent.to(dtype))
    if float(size) < tol:
        return None
    mean = (torch.cos(size) * mean + torch.sin(size) * (tangent / size)).to(mean.dtype)
    size = torch.linalg.vector_norm(mean.to(dtype))
    return (mean / size).to(mean.dtype) if float(size) > tol else mean
