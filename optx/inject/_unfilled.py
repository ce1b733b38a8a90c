"""Tensors that were added on the meta device and got memory by ``to_empty``, but no values yet.

They are filled with NaN, so that whoever gives them values, in whatever way, is seen to have done so; and
until then a call says what is wrong, where it would compute with what happens to be in memory. Whole numbers
can't say so, and are 0, where counts begin.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def on_meta(module: nn.Module) -> list[str]:
    """The tensors that have no memory."""
    return [name for name, tensor in _tensors(module).items() if tensor.is_meta]


@torch.no_grad()
def fill(module: nn.Module, names: list[str]) -> list[str]:
    """Mark those that have memory now as without values; the names of those that tell."""
    here = _tensors(module)
    got = [name for name in names if name in here and not here[name].is_meta]
    marked = [name for name in got if here[name].is_floating_point()]
    for name in got:
        here[name].fill_(torch.nan if name in marked else 0)
    return marked


@torch.no_grad()
def still(module: nn.Module, names: list[str]) -> list[str]:
    """Those that nobody has given values since."""
    here = _tensors(module)
    return [name for name in names if name in here and _is_unfilled(here[name])]


def _is_unfilled(tensor: Tensor) -> bool:
    mine = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore
    return not mine.is_meta and mine.numel() > 0 and bool(mine.isnan().all())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
