"""What `Handle.metrics` returns: numbers of what was attached, for a log."""

from __future__ import annotations

from torch import nn

from optx.inject._quantised import numbers
from optx.inject._served import OnModel


def collect(handle: OnModel) -> dict[str, float]:
    """All numbers by name."""
    adapter = handle.served[0].part.adapter
    parameters: dict[int, nn.Parameter] = {}
    for module in (*(one.part for one in handle.served), *(kept.module for kept in handle.saved)):
        parameters.update({id(p): p for p in module.parameters() if p.requires_grad})
    return {f"{adapter}/trainable": float(sum(map(numbers, parameters.values())))}
