"""A block of windows: norm, attention and MLP of those that are given, each with its shortcut.

Source: AdaWPT, arXiv 2306.14268, equations of the block; steps 5 and 6 of the authors' ``model_hw.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx.inject._window_grid import Grid, attention_mask


def residual(
    block: Any,
    windows: Tensor,
    grid: Grid,
    batch: int,
    *,
    index: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a block makes of windows.

    Args:
        block: a `WindowBlock`.
        windows: those that are computed, (n, tokens of one, C).
        grid: of the image.
        batch: how many images there are.
        index: which of all windows these are; None: all of them.
        gate: D of each window, 0 or 1: what is added to a window is multiplied by it, and so is the input of
            attention, so that the predictor learns from both. None: all are kept, or the dropped left out.

    Returns:
        The windows, and the attention weights if attention hands them out.
    """
    real = grid.real(windows)
    real = None if real is None else _of(real, index, batch)
    shortcut, u = windows, windows
    if not block.post_norm:
        u = block.norm1(u)
        u = u if real is None else u * real  # padding is 0 after the norm
    u, a_mask = _gated(u, gate), _mask(grid, u, index)
    a, weights = _with_weights(block.attn(u, a_mask))
    a = block.norm1(a) if block.post_norm else a
    first, second = block.drop_path or (None, None)
    # Biases make this other than 0 for a window whose input is 0: the second D is what drops it.
    y = shortcut + _gated(_path(first, a, index, batch), gate)
    y = y if real is None else y * real  # for an MLP that sees its whole window
    m = block.norm2(block.mlp(y)) if block.post_norm else block.mlp(block.norm2(y))
    return y + _gated(_path(second, m, index, batch), gate), weights


def _with_weights(out: Any) -> tuple[Any, Any]:
    """What attention gave, and its weights, where it gives those too."""
    return (out[0], out[1] if len(out) > 1 else None) if isinstance(out, tuple) else (out, None)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.to(x.dtype)[:, None, None]


def _path(drop: Any, x: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """Stochastic depth, of whole images; where windows are left out nothing is trained."""
    if drop is None or index is not None:
        return x
    return drop(x.reshape(batch, -1, x.shape[-1])).reshape(x.shape)


def _of(per_window: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """What is known of one image's windows, for those that are computed of all images."""
    if index is None:
        return per_window.repeat(batch, *(1 for _ in per_window.shape[1:]))
    return per_window[index % len(per_window)]


def _mask(grid: Grid, like: Tensor, index: Tensor | None) -> Tensor | None:
    """Of one image's windows, or of each window that is computed."""
    regions = grid.regions(like.device)
    if regions is None:
        return None
    return attention_mask(regions if index is None else regions[index % len(regions)], like.dtype)


def gathered(block: Any, x: Tensor, grid: Grid, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """The image (B, H, W, C) with its kept windows computed; the others are copies of what they were.

    Args:
        block: a `WindowBlock`.
        x: the image; returned itself if no window is kept.
        grid: its windows.
        kept: which are computed, (B * windows,).
    """
    index = kept.nonzero().squeeze(1)
    if not len(index):
        return x, None
    windows = grid.split(x)
    if len(index) == len(windows):
        y, weights = residual(block, windows, grid, len(x), index=index)
        return grid.join(y), weights
    y, weights = residual(block, windows[index], grid, len(x), index=index)
    kind = torch.promote_types(y.dtype, windows.dtype)
    y = windows.to(kind).index_copy(0, index, y.to(kind))
    if weights is not None:  # a window that is not computed attends to nothing
        weights = weights.new_zeros(len(windows), *weights.shape[1:]).index_copy(0, index, weights)
    return grid.join(y), weights
