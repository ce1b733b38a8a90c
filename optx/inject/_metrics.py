"""What `Handle.metrics` returns: numbers of what was attached, for a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optx._names import is_dtensor
from optx._read import values
from optx.inject._quantised import numbers
from optx.inject._served import OnModel


def collect(handle: OnModel) -> dict[str, float]:
    """All numbers by name, read from the device at once."""
    adapter = handle.served[0].part.adapter
    trained = _trained(handle)
    found: dict[str, float | Tensor] = {
        "trainable": float(sum(map(numbers, trained))),
        "merged": float(any(one.part.merged for one in handle.served)),
    }
    with torch.no_grad():
        # Shards are of this rank alone, and nobody else is asked.
        if not any(map(is_dtensor, trained)):
            found.update(_norms(handle, trained))
        for injection in {id(one.injection): one.injection for one in handle.served}.values():
            found.update(injection.metrics(handle))
    return {f"{adapter}/{what}": value for what, value in _plain(found).items()}


def _trained(handle: OnModel) -> list[nn.Parameter]:
    """What an optimizer can move, each once."""
    modules = (*(one.part for one in handle.served), *(kept.module for kept in handle.saved))
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def _norms(handle: OnModel, trained: Sequence[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if trained:
        found["norm"] = _root([wide(p).square().sum() for p in trained])
    changes = [one.part.change_sq() for one in handle.served if not one.part.weightless]
    known = [change for change in changes if change is not None]
    if known and len(known) == len(changes):
        found["change_norm"] = _root(known)
    return found


def _root(squares: Sequence[Tensor]) -> Tensor:
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _plain(found: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Every number as Python's."""
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    read = dict(zip(tensors, values([t.reshape(1) for t in tensors.values()]), strict=True))
    return {
        name: float(read[name][0]) if isinstance(value, Tensor) else float(value)
        for name, value in found.items()
    }


def wide(t: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


def product_sq(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The squared norm of scale * b a, without making it.

    Args:
        a: (..., rank, in).
        b: (..., out, rank).
        scale: a number.
    """
    left, right = wide(b), wide(a)
    return ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0.0) * scale**2
