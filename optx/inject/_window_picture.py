"""Pictures of which windows are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def draw(path: str | PathLike[str], maps: Mapping[str, Tensor], image: Tensor | None) -> None:
    """One panel a block: the image, dark where windows are dropped.

    Args:
        path: of the file.
        maps: by block, what is kept of the tokens (height, width).
        image: (channels, H, W), or None.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.axis("off")
    for one, (name, kept) in zip(axes.flat, maps.items(), strict=False):
        one.imshow(_shaded(kept, image), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
        one.set_title(f"{name}\n{float(kept.float().mean()):.0%} kept", fontsize=7)
    figure.savefig(path, dpi=120)


def _shaded(kept: Tensor, image: Tensor | None) -> Any:
    """What imshow takes: kept as it is, dropped at a quarter of its light."""
    light = 0.25 + 0.75 * kept.detach().cpu().float()
    if image is None:
        return light.numpy()
    image = image.detach().cpu().float()
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp_min(torch.finfo(torch.float32).eps)
    image = image[:3] if len(image) >= 3 else image[:1]
    light = F.interpolate(light[None, None], size=image.shape[-2:], mode="nearest")[0]
    shaded = image * light
    return shaded[0].numpy() if len(shaded) == 1 else shaded.permute(1, 2, 0).numpy()
