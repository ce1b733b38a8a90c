"""Robust weight signatures on handwritten digits: the merge recipe's third part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._handwriting import handwriting
from ._run import Run

LAYERS = 5
EPOCHS = 15
CORRUPTED: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "contrast": lambda x, _: 0.2 * x + 0.4,
    "blur": lambda x, _: F.avg_pool2d(x, 3, stride=1, padding=1),
    "noise": lambda x, draws: x + 0.6 * torch.randn(x.shape, generator=draws),
}


def network() -> nn.Sequential:
    """Three convolutions and two linear layers for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, change: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A trained copy of the model."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(model(change(x[index])), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits that are read right."""
    return float((model(x).argmax(1) == y).float().mean())


def measure(seed: int, epochs: int, run: Run) -> dict[str, Any] | None:
    """Clean and corrupted accuracy with the first K layers patched, by corruption; None if interrupted."""
    x, y = handwriting()
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed + 99)
    order = torch.randperm(len(x))
    learn, test = order[:1200], order[1200:]
    pretrained = train(network(), x[learn[:300]], y[learn[:300]], 3, lambda x: x)
    standard = train(pretrained, x[learn], y[learn], epochs, lambda x: x)
    found: dict[str, Any] = {}
    for i in run.steps(f"patch, seed {seed}", 0, len(CORRUPTED)):
        name = list(CORRUPTED)[i]
        corrupt = CORRUPTED[name]
        robust = train(pretrained, x[learn], y[learn], epochs, lambda x, corrupt=corrupt: corrupt(x, draws))
        views = x[test], corrupt(x[test], draws)

        def read(model: nn.Module, views: tuple[Tensor, Tensor] = views) -> list[float]:
            return [accuracy(model, view, y[test]) for view in views]

        def patched(
            signature: optx.Signature, read: Callable[[nn.Module], list[float]] = read
        ) -> list[float]:
            with optx.patch(standard, [signature]):
                return read(standard)

        signatures = [
            optx.rws.extract(pretrained, standard, robust, layers=optx.shallowest(standard, count))
            for count in range(1, LAYERS + 1)
        ]
        most = signatures[-2]
        found[name] = {
            "curve": [read(standard), *map(patched, signatures)],
            "robust": read(robust),
            "4 bits": patched(most.quantize(16)),
            "smaller": most.nbytes / most.quantize(16).nbytes,
        }
    return None if run.interrupt.wanted else found
