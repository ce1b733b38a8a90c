"""What SaRA refuses: weights without values, company of a compact step, and foreign checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optx._errors import ShapeError, TransformError
from optx._names import is_dtensor, parameter_names
from optx.step import bits
from optx.step.state import is_ours, saved_slots
from optx.step.transform import Host

_KEY = "optx.sara.mask"


def check_company(sara: Any, optimizer: Host) -> None:
    """Raise where a step on the selected entries alone is not what base and other transforms ask for."""
    if sara.compact:
        others = [t for t in optimizer.transforms if t is not sara]
        if others:
            raise TransformError(
                f"SaRA: compact=True steps on the selected entries alone, where {type(others[0]).__name__} "
                "would not find its weights. Use compact=False."
            )
        if type(optimizer.base) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise TransformError(
                f"SaRA: compact=True serves SGD, Adam and AdamW; the base is {type(optimizer.base).__name__}."
                " Use compact=False."
            )


def check_weights(sara: Any, optimizer: Host) -> list[Tensor]:
    """The trainable weights that are served; raises where one can't be selected from."""
    weights = [p for p in optimizer.served(sara) if p.requires_grad]
    names = parameter_names(optimizer.base)
    for p in weights:
        if p.is_meta:
            raise TransformError(
                f"SaRA: parameter {names[id(p)]!r} is on the meta device and has no values to select by. "
                "Load the weights before wrapping."
            )
        if sara.compact and is_dtensor(p):
            raise TransformError(
                f"SaRA: compact=True does not serve sharded weights, as {names[id(p)]!r} is. Use "
                "compact=False."
            )
    if not any(p.numel() for p in weights):
        raise TransformError("SaRA: there is no trainable weight to select from (sara=False in all groups?).")
    return weights


def check_load(sara: Any, optimizer: Host, state_dict: Mapping[str, Any]) -> None:
    """Raise where loaded state was trained without a selection, or with one of another form or size."""
    if not {"state", "param_groups"} <= state_dict.keys():
        return  # no state dict: the load itself says so
    saved_groups, state = state_dict["param_groups"], state_dict["state"]
    masks, names = saved_slots(dict(state_dict)), parameter_names(optimizer.base)
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=False):
        if not sara.serves(group):
            continue
        for key, p in zip(saved["params"], group["params"], strict=False):
            entry = state.get(key) or {}
            trained = isinstance(entry, dict) and any(not is_ours(k) for k in entry)
            mask = masks.get(key, {}).get(_KEY)
            if not p.requires_grad or (mask is None and not trained):
                continue
            if mask is None:
                raise TransformError(
                    f"SaRA: the checkpoint has state of {names[id(p)]!r} and no selection, so it was trained "
                    "otherwise, and a selection made now would be of weights that have moved. To begin SaRA "
                    "there, load it into the plain optimizer and then wrap that."
                )
            if bool(saved.get("optx.sara.compact", sara.compact)) is not sara.compact:
                raise TransformError(
                    f"SaRA: the checkpoint was saved with compact={not sara.compact}, whose state has "
                    f"another form; give SaRA compact={not sara.compact}."
                )
            if sara.compact:
                _check_sizes(names[id(p)], p, mask, entry)


def _check_sizes(name: str, p: Tensor, mask: Any, entry: dict[str, Any]) -> None:
    """A compact state has as many numbers as its mask has entries."""
    if not isinstance(mask, Tensor):
        return  # the load itself says so
    count = int(bits.mask_of(bits.settled(mask, p), p).sum())
    for key, t in entry.items():
        if not is_ours(key) and key != "step" and isinstance(t, torch.Tensor) and t.shape != (count,):
            raise ShapeError(
                f"SaRA: the checkpoint selects {count} entries of {name!r}, and its {key!r} has shape "
                f"{tuple(t.shape)}; it must be ({count},)."
            )
