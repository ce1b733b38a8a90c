"""A perceptron that reads digits, pruned and retrained: the prune recipe's quick arm."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._handwriting import handwriting
from ._run import warmed_up

HEAD = "6"
SHARES = (0.9, 0.95, 0.98)
TRAIN = 1300
STEPS = {"dense": 600, "retrained": 300}
BATCH = 64

# What is trained of the pruned network, and at which rate; None: all that is left, with KeepMask.
KINDS: dict[str, tuple[optx.Perp | None, float]] = {
    "biases": (optx.Perp(norm=False), 5e-3),
    "+ norms": (optx.Perp(), 5e-3),
    "+ MaskLoRA": (optx.Perp(adapter="mask", rank=8, alpha=16), 2e-3),
    "all": (None, 1e-3),
}


def network() -> nn.Sequential:
    """64-256-256-10, with layer norms; its two hidden matrices are what is pruned."""
    layers: list[nn.Module] = []
    for inputs in (64, 256):
        layers += [nn.Linear(inputs, 256), nn.LayerNorm(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor, y: Tensor) -> None:
    """So many steps."""
    schedule = warmed_up(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(x), (BATCH,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def retrained(
    model: nn.Module, masks: optx.Masks, kind: str, steps: int, x: Tensor, y: Tensor
) -> tuple[nn.Module, int]:
    """A pruned network trained on, with all its zeros; and how many numbers were trained."""
    perp, lr = KINDS[kind]
    if perp is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
        optimizer = optx.wrap(optimizer, optx.KeepMask(masks, model))
        fit(model, optimizer, steps, x, y)
        trained = sum(p.numel() for p in model.parameters()) - masks.report().total.zeros
    else:
        handle = optx.attach(model, perp, masks=masks)
        optx.trainable_only(model, handle)
        optimizer = torch.optim.AdamW(handle.parameters(), lr, weight_decay=0.0)
        fit(model, optimizer, steps, x, y)
        trained = sum(p.numel() for p in handle.parameters())
        model = handle.merge_and_unload()
    masks.verify(model)
    return model, trained


def measure(seed: int) -> dict[str, Any]:
    """Accuracy of one network pruned to each share, before and after each kind of retraining."""
    images, labels = handwriting()
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    x, y = images.flatten(1)[order], labels[order]
    x, x_test, y, y_test = x[:TRAIN], x[TRAIN:], y[:TRAIN], y[TRAIN:]

    @torch.no_grad()
    def right(model: nn.Module) -> float:
        return float((model(x_test).argmax(1) == y_test).float().mean())

    dense = network()
    fit(dense, torch.optim.AdamW(dense.parameters(), 1e-3), STEPS["dense"], x, y)
    found: dict[str, Any] = {"dense": right(dense)}
    for share in SHARES:
        pruned = copy.deepcopy(dense)
        masks = optx.prune(pruned, optx.Magnitude(share), exclude=HEAD, progress=False)
        one: dict[str, Any] = {"pruned": right(pruned), "trained": {}}
        for kind in KINDS:
            model, trained = retrained(copy.deepcopy(pruned), masks, kind, STEPS["retrained"], x, y)
            one[kind] = right(model)
            one["trained"][kind] = trained
        found[f"{share:g}"] = one
    return found
