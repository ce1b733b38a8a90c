"""The slopes of activations: what is known of each, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optx._errors import OptxError
from optx.analysis.bounds._system import Groups, Slopes
from optx.lipschitz.activations import GroupSort, Householder, MaxMin, in_groups

Pair = tuple[float, float]

# Rounded outwards; each is tried on a fine grid in tests/analysis/test_slopes.py.
_SILU = (-0.09983933, 1.09983933)
_GELU = {"none": (-0.12890415, 1.12890415), "tanh": (-0.12899307, 1.12899307)}
_MISH = (-0.11252613, 1.08849817)
_SELU = 1.7580993408473766 + 1e-12  # its scale times its alpha


def _softplus(module: Any) -> Pair:
    if module.threshold < 20:  # it jumps there, by log(1 + exp(-threshold)) / beta
        raise OptxError(
            f"Softplus has threshold={module.threshold:g}, where it jumps; with the default, 20, it jumps "
            "by 2e-9."
        )
    return (0.0, 1.0)


def _rrelu(module: Any) -> Pair:
    if module.training:
        raise OptxError("RReLU draws its slopes in training mode; call model.eval().")
    slope = (module.lower + module.upper) / 2
    return (min(slope, 1.0), max(slope, 1.0))


_SLOPES: dict[type[nn.Module], Callable[[Any], Pair]] = {
    nn.ReLU: lambda _: (0.0, 1.0),
    nn.ReLU6: lambda _: (0.0, 1.0),
    nn.LeakyReLU: lambda m: (min(m.negative_slope, 1.0), max(m.negative_slope, 1.0)),
    nn.RReLU: _rrelu,
    nn.Hardtanh: lambda _: (0.0, 1.0),
    nn.Tanh: lambda _: (0.0, 1.0),
    nn.Tanhshrink: lambda _: (0.0, 1.0),
    nn.Softshrink: lambda _: (0.0, 1.0),
    nn.Softsign: lambda _: (0.0, 1.0),
    nn.Sigmoid: lambda _: (0.0, 0.25),
    nn.LogSigmoid: lambda _: (0.0, 1.0),
    nn.Hardsigmoid: lambda _: (0.0, 1 / 6),
    nn.Softplus: _softplus,
    nn.ELU: lambda m: (min(m.alpha, 0.0), max(m.alpha, 1.0)),
    nn.CELU: lambda m: (0.0, 1.0) if m.alpha > 0 else (float("nan"), float("nan")),
    nn.SELU: lambda _: (0.0, _SELU),
    nn.SiLU: lambda _: _SILU,
    nn.GELU: lambda m: _GELU[m.approximate],
    nn.Mish: lambda _: _MISH,
    nn.Hardswish: lambda _: (-0.5, 1.5),
}

# Calls that are an activation; what they are given besides is what the module's constructor takes.
FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **{torch.relu: nn.ReLU, torch.tanh: nn.Tanh, torch.sigmoid: nn.Sigmoid},
    **{"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid},
    **{F.relu: nn.ReLU, F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.hardtanh: nn.Hardtanh},
    **{F.tanh: nn.Tanh, F.tanhshrink: nn.Tanhshrink, F.softshrink: nn.Softshrink, F.softsign: nn.Softsign},
    **{F.sigmoid: nn.Sigmoid, F.logsigmoid: nn.LogSigmoid, F.hardsigmoid: nn.Hardsigmoid},
    **{F.softplus: nn.Softplus, F.elu: nn.ELU, F.celu: nn.CELU, F.selu: nn.SELU, F.silu: nn.SiLU},
    **{F.gelu: nn.GELU, F.mish: nn.Mish, F.hardswish: nn.Hardswish},
    "relu_": lambda: nn.ReLU(inplace=True),
    torch.relu_: lambda: nn.ReLU(inplace=True),
    torch.abs: lambda: Absolute(),
    "abs": lambda: Absolute(),
}


class Absolute(nn.Module):
    """|x|, which torch has as a function only."""


_SLOPES[Absolute] = lambda _: (-1.0, 1.0)


def own_type(module: nn.Module, kinds: Any) -> type[nn.Module] | None:
    """Which of some classes a module computes as: it is one, or inherits its forward; None if none."""
    forward = type(module).forward
    return next((one for one in type(module).__mro__ if one in kinds and one.forward is forward), None)


def is_activation(module: nn.Module, declared: dict[type[nn.Module], Pair]) -> bool:
    """Whether something is known of it."""
    return type(module) in declared or bool(own_type(module, {*_SLOPES, nn.PReLU, *_GROUPS}))


def activation(
    module: nn.Module, shape: tuple[int, ...], declared: dict[type[nn.Module], Pair]
) -> Slopes | Groups:
    """What is known of an activation of values of a shape (without the batch)."""
    if type(module) in declared:
        return _constant(declared[type(module)], shape)
    kind = own_type(module, {*_SLOPES, nn.PReLU, *_GROUPS})
    if kind is None:
        raise OptxError(f"{type(module).__name__} has no quadratic constraint")
    if kind is nn.PReLU:
        return _prelu(module, shape)
    if kind in _GROUPS:
        return _GROUPS[kind](module, shape)
    return _constant(_SLOPES[kind](module), shape)


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
