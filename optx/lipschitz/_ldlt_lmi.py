"""LipSDP's matrix of a chain, whose least eigenvalue says whether it is L-Lipschitz: the certificate."""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx.inject._weights import is_conv
from optx.lipschitz._ldlt_weights import Link

TOLERANCE = 1e-6
"""What rounding of float32 weights leaves below 0, of the largest of L^2 and 1."""


@dataclass(frozen=True)
class Certificate:
    """What LipSDP's matrix says of a chain's weights as they are now.

    Attributes:
        L: the Lipschitz constant in l2, from the first layer's input to the last's output, in eval mode.
        min_eigenvalue: of N - Y^T Y in float64, whose being at least 0 proves it; for convolutions on an
            image of the size that was given.
        training_L: the constant while dropout between the layers acts: L times 1 / (1 - p) of each.
        first: the path of the first layer.
        last: and of the last.
    """

    L: float
    min_eigenvalue: float
    training_L: float
    first: str
    last: str

    @property
    def holds(self) -> bool:
        """Whether the eigenvalue is at least 0, up to what rounding leaves: 1e-6 max(1, L^2)."""
        return self.min_eigenvalue >= -TOLERANCE * max(1.0, self.L**2)


def matrix(
    C: Sequence[Tensor],
    links: Sequence[Link],
    L: float,
    A: Tensor | None,
    B: Tensor,
    multipliers: Sequence[Tensor] | None = None,
) -> Tensor:
    """N - Y^T Y of y = A x + B w_n, w_k = phi(C_k w_{k-1}); without A, y = B w_n.

    Args:
        C: weights of the layers that have an activation behind them.
        links: theirs, with the slopes.
        L: the constant.
        A: of the skip.
        B: the last layer's weight.
        multipliers: of each activation, above 0; None: ones.

    Returns:
        Symmetric, of the size of all widths together; at least 0 where the net is L-Lipschitz.
    """
    sizes = [C[0].shape[1] if C else B.shape[1], *(one.shape[0] for one in C)]
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    blocks = [slice(*pair) for pair in itertools.pairwise(ends)]
    N = torch.zeros(ends[-1], ends[-1], dtype=B.dtype, device=B.device)
    N[blocks[0], blocks[0]].diagonal().fill_(L * L)
    for k, (one, link) in enumerate(zip(C, links, strict=False), 1):
        m = one.new_ones(len(one)) if multipliers is None else multipliers[k - 1]
        own, before = blocks[k], blocks[k - 1]
        N[own, own] += torch.diag(2.0 * m)
        N[before, before] += 2.0 * link.low * link.high * one.mT @ (m[:, None] * one)
        N[own, before] = -(link.low + link.high) * m[:, None] * one
        N[before, own] = N[own, before].mT
    Y = torch.zeros(len(B), ends[-1], dtype=B.dtype, device=B.device)
    Y[:, blocks[-1]] = B
    if A is not None:
        Y[:, blocks[0]] += A
    return N - Y.mT @ Y


def unrolled(module: Any, weight: Tensor, shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """A convolution of one image of a size as a matrix, and the size of what comes out.

    Args:
        module: the convolution.
        weight: its weight, in float64.
        shape: (channels, ...).
    """
    size = torch.Size(shape).numel()
    images = torch.eye(size, dtype=weight.dtype, device=weight.device).view(size, *shape)
    with torch.no_grad():
        out = module._conv_forward(images, weight, None)
    return out.flatten(1).mT, tuple(out.shape[1:])


def matrices(
    modules: Sequence[nn.Module], weights: Sequence[Tensor], shape: Sequence[int] | None
) -> list[Tensor]:
    """Every layer's weight as a matrix; convolutions are unrolled from ``shape`` on."""
    found: list[Tensor] = []
    for module, weight in zip(modules, weights, strict=True):
        if is_conv(module):
            assert shape is not None
            made, shape = unrolled(module, weight, shape)
            found.append(made)
        else:
            found.append(weight)
    return found
