"""What `Wrapped.metrics` returns: numbers of the last step, and of the groups as they are now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optx.step.measured import INCOMING_SQ, Measured, squares
from optx.step.numbers import as_float
from optx.step.transform import Group, Host

OWN = "optx"  # what the names of numbers begin with that are no transform's


def collect(wrapped: Host) -> dict[str, float]:
    """All numbers by name, read from the device at once."""
    found = _rates(wrapped.param_groups, wrapped.measured)
    found[f"{OWN}/skipped_steps"] = float(wrapped.skipped_steps)
    norm = _gradient_norm(wrapped.measured)
    if norm is not None:
        found[f"{OWN}/grad_norm"] = norm
    for transform in wrapped.transforms:
        own = transform.metrics(wrapped)
        found.update({f"{transform.name}/{what}": float(value) for what, value in own.items()})
    return found


def _rates(groups: Sequence[Group], measured: Measured) -> dict[str, float]:
    """The mean lr of the groups in the last step (before one: now), and each one's where they differ."""
    given = rates(groups) if measured.rates is None else measured.rates
    tensors = {i: lr for i, lr in given.items() if isinstance(lr, Tensor) and lr.device.type != "cpu"}
    read: Mapping[int, float | None] = {
        **{i: as_float(lr) for i, lr in given.items() if i not in tensors},
        **dict(zip(tensors, measured.read(list(tensors.values())), strict=True)),
    }
    known = {i: value for i, value in sorted(read.items()) if value is not None}
    if not known:
        return {}
    found = {f"{OWN}/lr": sum(known.values()) / len(known)}
    if len(set(known.values())) > 1:
        found.update({f"{OWN}/lr/{i}": value for i, value in known.items()})
    return found


def rates(groups: Sequence[Group]) -> dict[int, Any]:
    """Each group's lr as it is now, by its number: a scheduler moves it on after the step."""
    given = {i: group["lr"] for i, group in enumerate(groups) if "lr" in group}
    return {i: lr.detach().clone() if isinstance(lr, Tensor) else lr for i, lr in given.items()}


def _gradient_norm(measured: Measured) -> float | None:
    """Of what the last step was given; None where that was not measured and is gone."""
    if not measured or not measured.whole:
        return None
    square = measured.sum(INCOMING_SQ)
    if square is None and (grads := measured.gradients()):
        square = squares(grads)
    return None if square is None else math.sqrt(max(square, 0.0))
