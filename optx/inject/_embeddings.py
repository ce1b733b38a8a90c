"""How embeddings of pretrained models look rows up, which is not always nn.Embedding's way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def peculiar(module: nn.Module) -> str:
    """What keeps an embedding's output from being (scaled) rows of its weight; empty if nothing does."""
    if not isinstance(module, nn.Embedding):
        return ""
    if module.max_norm is not None:
        return " with max_norm, which changes its weight at every call"
    own = type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")
    return " that looks up rows in a way of its own" if own else ""


def rows(module: nn.Module, index: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of another table as the module looks up its own: some models (Gemma, BART) scale them."""
    found = F.embedding(index, table, padding_idx=padding_idx)
    scale: Any = getattr(module, "embed_scale", None)
    return found if scale is None else found * scale
