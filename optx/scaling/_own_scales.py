"""What a model itself multiplies by a power of its width: attention's logits, and T5's head.

A rule of width says what a factor must be in all; what the model does already is left out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from optx.inject._anatomy import attentions_of
from optx.inject._attention import Heads, heads_of
from optx.inject._module_paths import paths_of
from optx.scaling._width import HeadWidth, Width


def head_widths(model: nn.Module, base: nn.Module) -> dict[str, HeadWidth]:
    """How wide the heads of each attention module are in both models, by its path."""
    here, there = (attentions_of(paths_of(one).modules) for one in (model, base))
    found: dict[str, HeadWidth] = {}
    for path, module in here.items():
        twin = there.get(path)
        heads = [heads_of(one, None, None) for one in (module, twin) if one is not None]
        if twin is not None and all(isinstance(one, Heads) for one in heads):
            width, base_width = (one.width for one in heads if isinstance(one, Heads))
            found[path] = HeadWidth(width, base_width, scale_of(twin))
    return found


def heads_again(model: nn.Module, saved: Mapping[str, HeadWidth]) -> dict[str, HeadWidth]:
    """The same for another model of the base that these are of."""
    found: dict[str, HeadWidth] = {}
    for path, module in attentions_of(paths_of(model).modules).items():
        heads = heads_of(module, None, None)
        if path in saved and isinstance(heads, Heads):
            found[path] = HeadWidth(heads.width, saved[path].base_width, saved[path].base_scale)
    return found


def scale_of(module: nn.Module) -> float | None:
    """What an attention module says that it multiplies logits with; None if it doesn't say."""
    values = (getattr(module, name, None) for name in ("scaling", "scale"))
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def readout_factors(model: nn.Module, widths: Iterable[Width]) -> dict[str, float]:
    """By a head's path, what the model multiplies its input with besides, relative to base.

    T5 with tied embeddings multiplies by the inverse square root of the width.
    """
    inner = paths_of(model).modules[""]
    if not getattr(getattr(inner, "config", None), "scale_decoder_outputs", False):
        return {}
    head = next((width for width in widths if "lm_head.weight" in (width.name, *width.tied)), None)
    return {} if head is None else {"lm_head": head.m**-0.5}
