"""Batches of a person's loader, where the model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """A batch with its tensors where the model's first parameter is: mappings become dicts, rows tuples."""
    p = next(model.parameters(), None)
    return batch if p is None else _moved(batch, p.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, tuple | list):
        return tuple(_moved(one, device) for one in cast("Sequence[Any]", value))
    return value
