"""Digits with wrong labels, the network that reads them, and two measures of how sharp a minimum is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._handwriting import handwriting
from ._run import clock, device

TRAIN = 1000
MEASURED = 250
"""Training samples that sharpness is measured on."""
ROUNDS = 12
RHO = 0.05


def noisy_digits(seed: int, wrong: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1000 digits to train on, of which a share has a label drawn at random, and 797 with their own to "
    "test on."""
    images, labels = handwriting()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draws)
    x = images[order].to(device())
    y = labels[order].to(device())
    noisy = y.clone()
    drawn = torch.randperm(TRAIN, generator=draws)[: round(wrong * TRAIN)]
    noisy[drawn] = torch.randint(10, (len(drawn),), generator=draws).to(device())
    return x[:TRAIN], noisy[:TRAIN], x[TRAIN:], y[TRAIN:]


def network(width: int) -> nn.Sequential:
    """Four convolutions with batch norms, in the memory format that processors prefer."""
    layers: list[nn.Module] = []
    sizes = (1, width, width, 2 * width, 2 * width)
    for number, (before, after) in enumerate(pairwise(sizes)):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU(), *([nn.MaxPool2d(2)] if number == 1 else [])]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(*layers, *head).to(device(), memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits that are read right, in eval mode."""
    model.eval()
    right = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return right


def sharpness(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Of the training loss without any added term: the Hessian's largest eigenvalue, and SAM's measure.

    The first by power iteration from the same start for all; the second is how much the loss rises on a step
    of length 0.05 along its gradient.
    """
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    x, y = x[:MEASURED], y[:MEASURED]

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    here = loss()
    gradient = torch.autograd.grad(here, weights, create_graph=True)
    eigenvalue = largest_eigenvalue(gradient, weights)
    length = torch.stack([g.detach().square().sum() for g in gradient]).sum().sqrt()
    with torch.no_grad():
        for p, g in zip(weights, gradient, strict=True):
            p.add_(g, alpha=float(RHO / length))
        above = loss()
        for p, g in zip(weights, gradient, strict=True):
            p.sub_(g, alpha=float(RHO / length))
    model.train()
    return eigenvalue, float(above - here.detach())


def largest_eigenvalue(gradient: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Of the matrix whose products with vectors are derivatives of the gradient: the largest by size."""
    draws = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=draws).to(p) for p in weights]
    value = 0.0
    for _ in range(ROUNDS):
        length = torch.stack([t.square().sum() for t in v]).sum().sqrt()
        v = [t / length for t in v]
        product = torch.autograd.grad(gradient, weights, v, retain_graph=True)
        value = float(torch.stack([(a * b).sum() for a, b in zip(v, product, strict=True)]).sum())
        v = [t.detach() for t in product]
    return value


class Steps(Protocol):
    """What is timed."""

    def set_epoch(self, epoch: int) -> None:
        """Which epoch begins."""
        ...

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """One optimizer step."""
        ...


def in_turn(loops: Mapping[str, Steps], x: Tensor, y: Tensor, batch: int, rounds: int) -> dict[str, float]:
    """Ratios of each loop's step to the first one's, medians over rounds in which each takes one.

    What else the machine does is then the same for all. Three epochs come before; ``ms`` is the first one's
    median, in milliseconds.
    """
    batches = [b for b in torch.arange(TRAIN).split(batch) if len(b) == batch]
    warm = 3 * len(batches)
    found: dict[str, list[float]] = {kind: [] for kind in loops}
    for count in range(warm + rounds):
        index = batches[count % len(batches)]
        for kind, loop in loops.items():
            loop.set_epoch(count // len(batches))
            began = clock()
            loop.step(x[index], y[index], index)
            found[kind].append(clock() - began)
    times = {kind: each[warm:] for kind, each in found.items()}
    first = next(iter(times.values()))
    ratios = {
        kind: statistics.median(a / b for a, b in zip(each, first, strict=True))
        for kind, each in times.items()
    }
    return {**ratios, "ms": 1e3 * statistics.median(first)}
