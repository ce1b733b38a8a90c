"""Pruning a model the slow way: the whole of it is run anew for each block, and masks are NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from prune_by_hand import sparsegpt, wanda
from torch import Tensor, nn


def linears(block: nn.Module) -> dict[str, Any]:
    """The linear layers in a block, or itself, by path."""
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def walk(
    model: nn.Module,
    blocks: Sequence[str],
    run: Callable[[], Any],
    method: str = "wanda",
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """Prune half of each row of each block's linear layers in place; which are kept, by the weights' names.

    Args:
        model: dense.
        blocks: their paths, in order.
        run: calls the model with all of the data.
        method: ``"wanda"`` or ``"sparsegpt"``.
        counted: of one batch, which tokens count (batch, tokens).
    """
    kept: dict[str, Tensor] = {}
    for block in blocks:
        layers = {
            f"{block}.{path}".removesuffix("."): one
            for path, one in linears(model.get_submodule(block)).items()
        }
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, into=seen[name]: into.append(args[0]))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            transposed = type(layer).__name__ == "Conv1D"
            weight = layer.weight.detach().double()
            W = (weight.t() if transposed else weight).numpy()
            x = torch.cat(
                [(one if counted is None else one[counted]).reshape(-1, W.shape[1]) for one in seen[name]]
            )
            X = x.double().numpy()
            gone, new = (wanda(W, X, 0.5), W) if method == "wanda" else sparsegpt(W, X, 0.5)
            mask, value = torch.from_numpy(~gone), torch.from_numpy(new)
            kept[f"{name}.weight"] = mask.t() if transposed else mask
            value = value.masked_fill(~mask, 0)
            layer.weight.data.copy_(value.t() if transposed else value)
    return kept


def assert_same(masks: Any, kept: dict[str, Tensor], least: float = 1.0) -> None:
    """The same names, and masks that agree (a share of them at least)."""
    assert set(masks) == set(kept)
    for name, mask in kept.items():
        assert float((masks[name] == mask).float().mean()) >= least, name
