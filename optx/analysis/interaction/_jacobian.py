"""J^T J of a network's later features with respect to earlier activations, by vector-Jacobian products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import OptxError, warn

# Exact Jacobians need a backward pass for each coordinate of the target and position.
_MANY = 4096


@dataclass
class Sources:
    """How derivatives of a target's coordinates are summed over.

    Args:
        number: K random sign vectors, whose mean is unbiased (phi^T J)^T (phi^T J); None: each coordinate.
        generator: of the signs.
    """

    number: int | None
    generator: torch.Generator

    def pulls(self, target: Tensor, rotation: Tensor | None, kept: Tensor | None) -> Iterator[Tensor]:
        """Cotangents v of a target (B, ..., D) such that the sum of (v^T J)^T (v^T J) is J^T J.

        Args:
            target: the later activations.
            rotation: (D, r): the target's features are its rows times this; None: they are its coordinates.
            kept: which positions count.
        """
        rotation = None if rotation is None else rotation.to(target)
        if self.number is None:
            yield from _each(target, rotation, kept)
            return
        shape = (*target.shape[:-1], target.shape[-1] if rotation is None else rotation.shape[1])
        for _ in range(self.number):
            signs = torch.randint(2, shape, generator=self.generator).to(target) * 2 - 1
            v = signs if rotation is None else signs @ rotation.T
            yield (v if kept is None else v * kept[..., None]) / self.number**0.5

    def warn_of_many(self, owner: str, target: Tensor, rotation: Tensor | None) -> None:
        """Say that exact derivatives will take long."""
        features = target.shape[-1] if rotation is None else rotation.shape[1]
        if self.number is None and (count := positions(target) * features) > _MANY:
            warn(
                f"{owner}: exact derivatives of {count:,} numbers are as many backward passes a batch. "
                "sources=64, random signs, gives an unbiased estimate by 64."
            )


def _each(target: Tensor, rotation: Tensor | None, kept: Tensor | None) -> Iterator[Tensor]:
    """One coordinate at one position at a time, for all samples: these don't depend on each other."""
    B, D = target.shape[0], target.shape[-1]
    flat = target.new_zeros(B, positions(target), D)
    here = None if kept is None else kept.reshape(B, -1)
    for t in range(flat.shape[1]):
        for i in range(D if rotation is None else rotation.shape[1]):
            v = torch.zeros_like(flat)
            if rotation is None:
                v[:, t, i] = 1
            else:
                v[:, t] = rotation[:, i]
            yield (v if here is None else v * here[..., None]).view(target.shape)


def positions(x: Tensor) -> int:
    """Of (B, ..., d), how many there are between the samples and the features."""
    return math.prod(x.shape[1:-1])


def pulled(target: Tensor, v: Tensor, places: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """v^T J with respect to each place; None where the target doesn't depend on it."""
    if not target.requires_grad:
        return (None,) * len(places)
    return torch.autograd.grad(target, places, v, retain_graph=True, allow_unused=True)


def check_reached(owner: str, path: str, found: Tensor | None, where: str) -> Tensor:
    """The derivative.

    Raises:
        OptxError: there is none: the layer is not on the path to the target.
    """
    if found is None:
        raise OptxError(
            f"{owner}: {path!r} doesn't lead to {where}: nothing of its output goes there by operations that "
            "have derivatives."
        )
    return found
