"""What the selftune recipe's runs share: the digits, batches of them, noise, and how a model is judged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._handwriting import handwriting
from ._run import device

Data = dict[str, tuple[Tensor, Tensor]]


def digits(seed: int, size: int) -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 in three parts, scaled to deviations of 1."""
    images, y = handwriting()
    x = images.flatten(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = ((x - x.mean()) / x.std())[order].to(device()), y[order].to(device())
    parts = {"train": slice(size), "valid": slice(size, 3 * size), "test": slice(3 * size, None)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def noisy(x: Tensor, strength: Any) -> Tensor:
    """Augmentation: noise of one strength, or of one for each example."""
    return x + torch.as_tensor(strength, device=x.device).view(-1, 1) * torch.randn_like(x)


@torch.no_grad()
def losses(model: nn.Module, data: Data) -> dict[str, float]:
    """Cross-entropy on validation and test, and the share of test digits that are read right."""
    was, logits = model.training, {name: model.eval()(x) for name, (x, _) in data.items()}
    model.train(was)
    found = {name: F.cross_entropy(logits[name], data[name][1]).item() for name in ("train", "valid", "test")}
    return {**found, "accuracy": float((logits["test"].argmax(1) == data["test"][1]).float().mean())}
