"""scikit-learn's handwritten digits, as the recipes that read them take them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def handwriting() -> tuple[Tensor, Tensor]:
    """All 1,797 digits, (n, 1, 8, 8) from 0 to 1, and which they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def batches(part: tuple[Tensor, Tensor], seed: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Of images and what they are, epoch after epoch, without end."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(part[0]), generator=draws).split(size):
            yield part[0][index], part[1][index]
