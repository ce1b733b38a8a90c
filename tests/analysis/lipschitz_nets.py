"""Networks for the tests of `optx.analysis.lipschitz`: the spec's, and a table of all kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import optx


def weights(*matrices: object, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A chain of Linears without biases."""
    chain = list[nn.Module]()
    for matrix in matrices:
        W = torch.as_tensor(matrix, dtype=torch.float64)
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False).double()
        linear.weight.data = W.clone()
        chain += [linear, activation()]
    return nn.Sequential(*chain[:-1])


def random_weights(seed: int, sizes: Sequence[int] = (4, 8, 8, 3)) -> list[Tensor]:
    """N(0, 1/d) with NumPy's generator, as the spec's nets."""
    draw = np.random.default_rng(seed)
    return [
        torch.from_numpy(draw.standard_normal((rows, d)) / d**0.5) for d, rows in itertools.pairwise(sizes)
    ]


def random_net(
    seed: int, activation: Callable[[], nn.Module] = nn.ReLU, sizes: Sequence[int] = (4, 8, 8, 3)
) -> nn.Sequential:
    return weights(*random_weights(seed, sizes), activation=activation)


def with_biases(net: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """The same with biases, so that all patterns of activations are somewhere."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net:
        if isinstance(layer, nn.Linear):
            bias = torch.randn(layer.out_features, generator=generator, dtype=layer.weight.dtype)
            layer.bias = nn.Parameter(bias)
    return net


class Residual(nn.Module):
    """x + G(phi(W x))."""

    def __init__(self, W: object, G: object, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.outer = weights(W)[0], weights(G)[0]
        self.activation = nn.ReLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.activation(self.inner(x)))


def residual(seed: int, width: int = 4, blocks: int = 2, **options: nn.Module) -> nn.Sequential:
    draw = np.random.default_rng(seed)
    pairs = [draw.standard_normal((2, width, width)) / width**0.5 / 2 for _ in range(blocks)]
    return nn.Sequential(*(Residual(W, G, **options) for W, G in pairs))


def implicit(seed: int, activation: nn.Module | None = None) -> optx.Implicit:
    draw = np.random.default_rng(seed)
    W, U, C, b = (
        torch.from_numpy(draw.standard_normal(shape)) / 2.5 for shape in ((6, 6), (6, 4), (3, 6), (6,))
    )
    W = W * 0.8 / torch.linalg.matrix_norm(W, 2)
    return optx.Implicit(W, U, C, b, activation)


def householder(channels: int, group_size: int = 2, seed: int = 0) -> optx.Householder:
    module = optx.Householder(channels, group_size).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return module
