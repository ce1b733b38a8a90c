"""A search for the inputs at which a model changes most: a bound from below, and no proof of anything
else."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_ROUNDS = 40


def steepest(model: nn.Module, shape: tuple[int, ...], norm: str, data: Tensor | None, samples: int) -> float:
    """The largest norm of a Jacobian that a search finds.

    Hill climbing on each of many inputs: by turns a step along the gradient of what the model changes by
    between x + h d and x - h d, where d is the direction in which it changes most, and a random one.

    Args:
        model: a copy in float64 is used.
        shape: of one input.
        norm: l2 to l2, or l_inf to l_inf.
        data: inputs to begin with, (n, *shape); else normal ones, of standard deviations from 0.01 to 100.
        samples: how many inputs.
    """
    model = copy.deepcopy(model).to("cpu", torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if data is None:
        spread = 10 ** (torch.rand(samples, generator=generator, dtype=torch.float64) * 4 - 2)
        x = normal(samples, *shape) * _each(spread, len(shape))
    else:
        x = data.detach().to("cpu", torch.float64)
        x = x[torch.randint(len(x), (samples,), generator=generator)]
        spread = torch.full((samples,), float(x.std(0).mean()) if len(data) > 1 else 1.0, dtype=torch.float64)
    steps = spread.clamp_min(1e-6) / 4
    value, direction, row = _change(model, x, norm)
    for turn in range(_ROUNDS):
        if turn % 2:
            toward = normal(*x.shape)
        else:
            toward = _uphill(model, x, direction * _each(steps, len(shape)), row)
        size = toward.flatten(1).norm(dim=1).clamp_min(1e-300) / x[0].numel() ** 0.5
        moved = x + toward * _each(steps / size, len(shape))
        new_value, new_direction, new_row = _change(model, moved, norm)
        better = new_value > value
        wide = _each(better, len(shape))
        x, direction = moved.where(wide, x), new_direction.where(wide, direction)
        value, row = new_value.where(better, value), new_row.where(better, row)
        steps = torch.where(better, steps * 1.5, steps * 0.8)
    return float(value.max())


def _each(numbers: Tensor, dims: int) -> Tensor:
    return numbers.reshape(-1, *[1] * dims)


def _change(model: nn.Module, x: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of each input: its Jacobian's norm, the direction (of norm 1) that has it, and the output row (of
    l_inf)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = model(x).flatten(1)
        rows = [torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in y.unbind(1)]
    J = torch.stack([one.flatten(1) for one in rows], 1).double()
    if norm == "linf":
        value, row = J.abs().sum(-1).max(1)
        return value, J[torch.arange(len(J)), row].sign().reshape(x.shape), row
    _, S, V = torch.linalg.svd(J, full_matrices=False)
    return S[:, 0], V[:, 0].reshape(x.shape), torch.full((len(J),), -1)


def _uphill(model: nn.Module, x: Tensor, h: Tensor, row: Tensor) -> Tensor:
    """The gradient, by x, of how far apart x + h and x - h come to lie."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        apart = (model(x + h) - model(x - h)).flatten(1)
        one = apart.gather(1, row.clamp_min(0)[:, None]).abs().sum()
        (gradient,) = torch.autograd.grad(apart.norm(dim=1).sum() if int(row[0]) < 0 else one, x)
    return gradient
