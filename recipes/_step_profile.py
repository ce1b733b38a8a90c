"""Training steps under torch's profiler: every operation's own time, by part of the step and kind of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Shape = tuple[int, int]

MARK = "optx "
"""Begins the names of the parts: ``record_function(MARK + "forward")``, ``"backward"`` and ``"step"``."""


@dataclass(frozen=True)
class Operation:
    """One call.

    Attributes:
        kind: of work, with the part of the step: ``"backward: weight gradients"``.
        name: as torch has it, without ``aten::``.
        matrix: the shape of the weight whose gradient this is.
        seconds: its own, without those of calls inside.
    """

    kind: str
    name: str
    matrix: Shape | None
    seconds: float


def quickest(step: Callable[[], object], tokens: int, before: Sequence[Operation] = ()) -> list[Operation]:
    """Take one step under the profiler.

    Equal steps are equal operations in equal order, so each is as quick as its quickest: of two cores that
    others use too, some call here and there has no share.

    Args:
        step: takes it, in parts that are marked.
        tokens: that it sees; no matrix may have a size like this, or its gradients could not be told apart.
        before: what earlier steps gave.

    Returns:
        The operations, each with the shortest time that it had.

    Raises:
        RuntimeError: the step did other operations than those before.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    marked = [(event, names) for event in profiler.events() or [] if (names := _ancestry(event))]
    now = [_operation(event, names, tokens) for event, names in marked]
    if not before:
        return now
    if [o.name for o in before] != [o.name for o in now]:
        raise RuntimeError("Two steps did different operations; the model must do the same in each.")
    return [
        replace(o, seconds=min(o.seconds, earlier.seconds)) for o, earlier in zip(now, before, strict=True)
    ]


def warm_up() -> None:
    """The profiler's own first time takes a while."""
    with profile(activities=[ProfilerActivity.CPU]):
        torch.ones(())


def _ancestry(event: Any) -> list[str]:
    """Names from the event's up to its part's; none outside of the parts."""
    names: list[str] = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names if names[-1].startswith(MARK) else []


def _operation(event: Any, names: Sequence[str], tokens: int) -> Operation:
    name, part = names[0].removeprefix("aten::"), names[-1].removeprefix(MARK)
    kind, matrix = _kind(name, part, names, event.input_shapes, tokens)
    return Operation(f"{part}: {kind}", name, matrix, event.self_cpu_time_total * 1e-6)


def _kind(
    name: str, part: str, names: Sequence[str], shapes: Sequence[Sequence[int]], tokens: int
) -> tuple[str, Shape | None]:
    if part == "step":
        return "all", None
    if name in ("mm", "addmm") and part == "forward":
        return "products", None
    if name == "mm":
        # A weight gradient sums over tokens; an input gradient over one of the matrix's own sizes.
        (rows, inner), (_, columns) = shapes[:2]
        return ("weight gradients", sides(rows, columns)) if inner == tokens else ("input gradients", None)
    if name == "bmm" or "scaled_dot_product" in name:
        return "attention", None
    if any("embedding" in one.lower() for one in names):
        return "embedding", None
    return ("loss" if any("Loss" in one or "softmax" in one.lower() for one in names) else "other"), None


def sides(*shape: int) -> Shape:
    """A matrix's shape, however it is stored."""
    return min(shape), max(shape)
