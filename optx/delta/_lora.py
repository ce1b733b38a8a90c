"""A LoRA adapter's files as a delta: of the weights that it changes, or of its own factors.

Source: LoRA, arXiv 2106.09685, section 4.1; the files are PEFT's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from optx._errors import FileError, OptxError
from optx.delta._delta import Delta
from optx.delta._safetensors import Entry
from optx.delta._source import Files

D = TypeVar("D", bound=Delta)
_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def lora_delta(kind: type[D], folder: Path, target: str) -> D:
    """See `optx.Delta.lora`."""
    if target not in ("product", "factors"):
        raise OptxError(f"Delta.lora: target is {target!r}; it must be 'product' or 'factors'.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise FileError(
            f"Delta.lora: {str(folder)!r} has no adapter_config.json that can be read ({error})."
        ) from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        what = "DORA" if config.get("use_dora") else config.get("peft_type")
        raise OptxError(f"Delta.lora: {str(folder)!r} is an adapter of kind {what!r}; it must be LORA.")
    source = Files(folder)
    pairs = {name.removesuffix(_A): name for name in source.entries if name.endswith(_A)}
    for name, entry in source.entries.items():
        stem = name.removesuffix(_A).removesuffix(_B)
        if stem == name or stem not in pairs or stem + _B not in source.entries or len(entry.shape) != 2:
            raise OptxError(
                f"Delta.lora: {name!r} is no factor of a linear layer's LoRA. Merge the adapter into its "
                "model (handle.merge()), and take Delta.between(base, merged)."
            )
    recipe = ("lora", target, source.label, source.state)
    if target == "factors":
        entries = {
            n: Entry(e.shape, torch.promote_types(e.dtype, torch.float32)) for n, e in source.entries.items()
        }
        return kind(
            entries,
            lambda name: source.read(name).to(entries[name].dtype),
            recipe=recipe,
            piece=lambda name, begin, end: source.piece(name, begin, end).to(entries[name].dtype),
        )
    stems = {f"{stem.removeprefix(_PREFIX)}.weight": stem for stem in pairs}
    turned = bool(config.get("fan_in_fan_out"))

    def shape(stem: str) -> tuple[int, ...]:
        outputs, inputs = source.entries[stem + _B].shape[0], source.entries[stem + _A].shape[1]
        return (inputs, outputs) if turned else (outputs, inputs)

    def read(name: str) -> Tensor:
        a, b = (source.read(stems[name] + end).to(torch.float32) for end in (_A, _B))
        product = (b @ a).mul_(_scaling(config, name.removesuffix(".weight"), len(a)))
        return product.t().contiguous() if turned else product

    return kind({n: Entry(shape(stem), torch.float32) for n, stem in stems.items()}, read, recipe=recipe)


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """What the product is multiplied by: alpha over the rank, or over its root (rsLoRA)."""
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", path)
        ),
        config.get("lora_alpha", 8),
    )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
