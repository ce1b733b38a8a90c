"""Which tensors of a checkpoint belong to quantised weights: told by name, dtype and what is beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from optx._safetensors import Entry

# What a tensor's name ends with that belongs to a quantised weight, and whose it is.
_ENDINGS = {
    ".qweight": "GPTQ's or AWQ's",
    ".qzeros": "GPTQ's or AWQ's",
    ".absmax": "bitsandbytes'",
    ".quant_map": "bitsandbytes'",
    ".SCB": "bitsandbytes'",
    ".weight_format": "bitsandbytes'",
    ".weight_scale_inv": "block-wise float8",
    ".weight_packed": "compressed-tensors'",
    ".W_q": "HQQ's",
    ".codes": "AQLM's",
    ".codebooks": "AQLM's",
    ".centroids": "VPTQ's",
    ".dense_weights": "SpQR's",
    ".col_vals": "SpQR's",
    "_qdata": "torchao's",
    "._data._data": "quanto's",
    "._data": "quanto's",
}
_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32)


def quantised(name: str, entries: Mapping[str, Entry]) -> str:
    """Whose quantised weight a tensor belongs to; empty if it is none."""
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending) and (ending != "._data" or f"{name[:-6]}._scale" in entries):
            return kind
    if ".quant_state." in name:
        return "bitsandbytes'"
    entry = entries[name]
    if entry.dtype == torch.float8_e8m0fnu or (name.endswith("_blocks") and f"{name[:-7]}_scales" in entries):
        return "MX formats'"
    stem, is_weight = name.removesuffix("weight"), name.endswith("weight")
    if entry.dtype.itemsize == 1 and entry.dtype != torch.bool:
        scales = (f"{name}_scale", f"{name}_scale_inv", f"{name}_scales")
        if is_weight:
            scales = (
                *scales,
                *(f"{stem}{end}" for end in ("scale", "scales", "input_scale", "scale_weight")),
            )
        if any(scale in entries for scale in scales):
            return "scaled 8-bit"
    if entry.dtype in (torch.int32, torch.int16) and name.endswith(".B") and f"{name[:-1]}s" in entries:
        return "Marlin's"
    # A stack of experts is a parameter without the word in its name; a buffer of ints is no projection.
    named = is_weight or name.endswith("_proj")
    return "int" if named and entry.dtype in _CODES and len(entry.shape) > 1 else ""
