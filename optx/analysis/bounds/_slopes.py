"""What is known of each activation: the slopes of its units, or what it does to groups of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx.analysis.bounds._system import Groups, Slopes
from optx.lipschitz._slopes import SLOPES, Pair, own_type, slopes_of
from optx.lipschitz.activations import GroupSort, Householder, MaxMin, in_groups


def is_activation(module: nn.Module, declared: dict[type[nn.Module], Pair]) -> bool:
    """Whether something is known of it."""
    return type(module) in declared or bool(own_type(module, {*SLOPES, nn.PReLU, *_GROUPS}))


def activation(
    module: nn.Module, shape: tuple[int, ...], declared: dict[type[nn.Module], Pair]
) -> Slopes | Groups:
    """What is known of an activation of values of a shape (without the batch)."""
    if type(module) in declared:
        return _constant(declared[type(module)], shape)
    kind = own_type(module, {*SLOPES, nn.PReLU, *_GROUPS})
    if kind is nn.PReLU:
        return _prelu(module, shape)
    if kind in _GROUPS:
        return _GROUPS[kind](module, shape)
    return _constant(slopes_of(module), shape)


def _constant(pair: Pair, shape: tuple[int, ...]) -> Slopes:
    whole = torch.ones(shape, dtype=torch.float64).flatten()
    return Slopes(whole * pair[0], whole * pair[1])


def _prelu(module: Any, shape: tuple[int, ...]) -> Slopes:
    slope = module.weight.detach().to("cpu", torch.float64)
    slope = slope.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()
    return Slopes(slope.clamp(max=1), slope.clamp(min=1))


def _index(owner: str, shape: tuple[int, ...], size: int | None, dim: int) -> Tensor:
    """Where the units of each group lie in a flattened value: the module's own grouping, of numbers."""
    places = torch.arange(torch.Size(shape).numel()).reshape(1, *shape)
    if dim % places.ndim == 0:
        raise OptxError(f"{owner} has dim={dim}, which is the batch")
    return in_groups(owner, places, places.shape[dim] if size is None else size, dim).reshape(
        -1, size or places.shape[dim]
    )


def _sorted(owner: str, shape: tuple[int, ...], size: int | None, dim: int) -> Groups:
    """The sum of a group is kept; what is orthogonal to it is not."""
    index = _index(owner, shape, size, dim)
    N, g = index.shape
    sums = torch.ones(g, 1, dtype=torch.float64)
    free = torch.linalg.qr(torch.cat([sums, torch.eye(g, dtype=torch.float64)[:, 1:]], 1)).Q[:, 1:].T
    return Groups(index, free.expand(N, g - 1, g), 1.0)


def _reflected(module: Any, shape: tuple[int, ...]) -> Groups:
    """What is orthogonal to v is kept; along v, phi is |v^T x|."""
    index = _index("Householder", shape, module.group_size, module.dim)
    with torch.no_grad():
        v = module.normals().to("cpu", torch.float64)
    if not bool(v.isfinite().all()):
        raise OptxError("Householder has a weight of zeros, or one that is not finite")
    v = v / v.norm(dim=1, keepdim=True)
    reflection = torch.eye(v.shape[1], dtype=torch.float64) - 2 * v[:, :, None] * v[:, None]
    gain = float(reflection.abs().sum(-1).max().clamp_min(1))
    return Groups(index, v.repeat(len(index) // len(v), 1)[:, None], gain)


_GROUPS: dict[type[nn.Module], Callable[[Any, tuple[int, ...]], Groups]] = {
    MaxMin: lambda m, shape: _sorted("MaxMin", shape, 2, m.dim),
    GroupSort: lambda m, shape: _sorted("GroupSort", shape, m.group_size, m.dim),
    Householder: _reflected,
}
