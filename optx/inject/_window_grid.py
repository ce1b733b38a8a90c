"""How an image of tokens lies in windows: padding, cyclic shift, partition, and all of it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The windows of one block on one image size, all in tokens.

    Attributes:
        height: of the image.
        width: of the image.
        window: height and width of a window.
        shift: by how much the image is rolled up and to the left before it is cut.
        roll_first: whether padding comes after the roll (timm) and not before it (transformers).
    """

    height: int
    width: int
    window: Pair
    shift: Pair = (0, 0)
    roll_first: bool = False

    @property
    def counts(self) -> Pair:
        """Windows along the height and the width, padding included."""
        return -(-self.height // self.window[0]), -(-self.width // self.window[1])

    @property
    def padding(self) -> Pair:
        """Tokens added below and to the right."""
        (rows, columns), (high, wide) = self.counts, self.window
        return rows * high - self.height, columns * wide - self.width

    def split(self, image: Tensor) -> Tensor:
        """(B, H, W, C) as windows (B * windows, tokens of one, C); padding is 0."""
        below, right = self.padding
        if self.roll_first:
            image = self._roll(image, -1)
        if below or right:
            image = F.pad(image, (0, 0, 0, right, 0, below))
        if not self.roll_first:
            image = self._roll(image, -1)
        (rows, columns), (high, wide) = self.counts, self.window
        cut = image.reshape(len(image), rows, high, columns, wide, -1).transpose(2, 3)
        return cut.reshape(-1, high * wide, image.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """Back from `split`, every number as it is."""
        (rows, columns), (high, wide) = self.counts, self.window
        cut = windows.reshape(-1, rows, columns, high, wide, windows.shape[-1]).transpose(2, 3)
        image = cut.reshape(len(cut), rows * high, columns * wide, -1)
        if not self.roll_first:
            image = self._roll(image, 1)
        if any(self.padding):
            image = image[:, : self.height, : self.width]
        return self._roll(image, 1) if self.roll_first else image

    def _roll(self, image: Tensor, direction: int) -> Tensor:
        if not any(self.shift):
            return image
        return image.roll((direction * self.shift[0], direction * self.shift[1]), dims=(1, 2))

    def real(self, like: Tensor) -> Tensor | None:
        """Which tokens of each window are the image's, as 0 and 1 (windows, tokens of one, 1); None: all."""
        if not any(self.padding):
            return None
        return self.split(like.new_ones(1, self.height, self.width, 1))

    def means(self, tokens: Tensor) -> Tensor:
        """The mean over the image's tokens of each window: (B, H, W, C) to (B * windows, C)."""
        sums = self.split(tokens).sum(1)
        real = self.real(tokens)
        if real is None:
            return sums / (self.window[0] * self.window[1])
        return sums / real.sum(1).repeat(len(tokens), 1)  # padding is less than a window: none is empty

    def regions(self, device: torch.device) -> Tensor | None:
        """Which piece of the image each token of each window is from (windows, tokens of one): a shifted
        window may hold pieces from opposite sides, which do not attend to one another; None: no shift."""
        if not any(self.shift):
            return None
        below, right = self.padding
        rows = _region(self.height + below, self.window[0], self.shift[0], device)
        columns = _region(self.width + right, self.window[1], self.shift[1], device)
        whole = Grid(self.height + below, self.width + right, self.window)
        return whole.split((3 * rows[:, None] + columns)[None, :, :, None]).squeeze(-1)


def _region(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Along one axis of the rolled image: what is in no window with the other side, and the two sides."""
    place = torch.arange(length, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= length - window).long() + (place >= length - shift).long()


def attention_mask(regions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores in each window: 0 within a region, -100 between two (Swin)."""
    apart = regions[:, None, :] != regions[:, :, None]
    return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill(apart, -100.0)


def expand(per_window: Tensor, grid: Grid) -> Tensor:
    """(B, 1, rows, columns) of windows as the image's tokens (B, 1, H, W), rolled back."""
    tokens = grid.window[0] * grid.window[1]
    spread = per_window.reshape(-1, 1, 1).expand(-1, tokens, 1)
    return grid.join(spread).permute(0, 3, 1, 2)
