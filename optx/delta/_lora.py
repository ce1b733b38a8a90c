"""A LoRA adapter's files as a delta: of the weights that it changes, or of its own factors.

Source: LoRA, arXiv 2106.09685, section 4.1; the files are PEFT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from optx._errors import FileError, OptxError
from optx._safetensors import Entry
from optx.delta._checkpoint_source import Files
from optx.delta._difference import Difference
from optx.delta._float32_sums import difference_dtype
from optx.inject._peft_read import lora_from
from optx.inject._peft_write import PREFIX

D = TypeVar("D", bound=Difference)
_A, _B = ".lora_A.weight", ".lora_B.weight"


def lora_difference(kind: type[D], folder: Path, target: str) -> D:
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
        entries = {n: Entry(e.shape, difference_dtype(e.dtype)) for n, e in source.entries.items()}
        return kind(
            entries,
            lambda name: source.read(name).to(entries[name].dtype),
            recipe=recipe,
            piece=lambda name, begin, end: source.piece(name, begin, end).to(entries[name].dtype),
        )
    stems = {f"{stem.removeprefix(PREFIX)}.weight": stem for stem in pairs}
    lora, turned = lora_from(config, {}), bool(config.get("fan_in_fan_out"))

    def shape(stem: str) -> tuple[int, ...]:
        outputs, inputs = source.entries[stem + _B].shape[0], source.entries[stem + _A].shape[1]
        return (inputs, outputs) if turned else (outputs, inputs)

    def read(name: str) -> Tensor:
        a, b = (source.read(stems[name] + end).to(torch.float32) for end in (_A, _B))
        with torch.autocast(a.device.type, enabled=False):
            product = b @ a
        product.mul_(lora.scale_at(name.removesuffix(".weight"), len(a)))
        return product.t().contiguous() if turned else product

    return kind({n: Entry(shape(stem), torch.float32) for n, stem in stems.items()}, read, recipe=recipe)
