"""What a model itself multiplies by a power of width: attention's logits, T5's head, Gemma's embedding.

A rule of width says what a factor must be in all; what the model does already is left out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from optx._module_paths import paths_of
from optx.inject._anatomy import attentions_of
from optx.inject._attention import Heads, heads_of
from optx.scaling._width import HeadWidth, Width


def head_widths(model: nn.Module, base: nn.Module) -> dict[str, HeadWidth]:
    """How wide the heads of each attention module are in both models, by its path."""
    here, there = (attentions_of(paths_of(one).modules) for one in (model, base))
    found: dict[str, HeadWidth] = {}
    for path, module in here.items():
        twin = there.get(path)
        heads = [heads_of(one, None, None) for one in (module, twin) if one is not None]
        if twin is not None and all(isinstance(one, Heads) for one in heads):
            width, base_width = (_of_queries(one, heads_of(one, None, None)) for one in (module, twin))
            found[path] = HeadWidth(width, base_width, scale_of(twin))
    return found


def _of_queries(module: nn.Module, heads: Heads | str) -> int:
    """How wide a head's queries and keys are; latent attention's ``head_dim`` is but the rotated part."""
    own = getattr(module, "qk_head_dim", None)
    if type(own) is int and own > 0:
        return own
    return heads.width if isinstance(heads, Heads) else 0


def heads_again(model: nn.Module, saved: Mapping[str, HeadWidth]) -> dict[str, HeadWidth]:
    """The same for another model of the base that these are of."""
    found: dict[str, HeadWidth] = {}
    for path, module in attentions_of(paths_of(model).modules).items():
        heads = heads_of(module, None, None)
        if path in saved and isinstance(heads, Heads):
            width = _of_queries(module, heads)
            found[path] = HeadWidth(width, saved[path].base_width, saved[path].base_scale)
    return found


def scale_of(module: nn.Module) -> float | None:
    """What an attention module says that it multiplies logits with; None if it doesn't say."""
    values = (getattr(module, name, None) for name in ("scaling", "scale"))
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def readout_factors(model: nn.Module, widths: Iterable[Width]) -> dict[str, float]:
    """By a module's path, what the model multiplies its input or output with besides, relative to base.

    T5 with tied embeddings multiplies by the inverse square root of the width before its head; Gemma, and
    BART and its kin with ``scale_embedding``, by the square root behind their embedding.
    """
    widths, modules = list(widths), paths_of(model).modules
    found: dict[str, float] = {}
    for width in widths:
        for name in (width.name, *width.tied):
            path = name.rpartition(".")[0]
            own = _embedding_scale(modules.get(path))
            if own is not None and width.kind == "input" and math.isclose(own, width.shape[1] ** 0.5):
                found[path] = width.m**0.5
    if getattr(getattr(modules[""], "config", None), "scale_decoder_outputs", False):
        head = next((width for width in widths if "lm_head.weight" in (width.name, *width.tied)), None)
        found |= {} if head is None else {"lm_head": head.m**-0.5}
    return found


def _embedding_scale(module: nn.Module | None) -> float | None:
    """What transformers' scaled embeddings multiply with; Gemma's buffer has no value on the meta device."""
    values = (getattr(module, name, None) for name in ("scalar_embed_scale", "embed_scale"))
    number = next((float(value) for value in values if isinstance(value, int | float)), None)
    return number if isinstance(module, nn.Embedding) else None
