"""What every trainer's callback logs: numbers of the optimizer that trainers have wrapped, and of handles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optx.inject._handle import Handle
from optx.step.wrapped import Wrapped

# Where Accelerate, DeepSpeed and Lightning, and wrappers like optx's, keep the optimizer that they wrap.
_INSIDE = ("optimizer", "_optimizer", "base")


def wrapped_in(optimizer: Any) -> Wrapped | None:
    """What `optx.wrap` made, inside whatever trainers have put around it; None if there is none."""
    seen: set[int] = set()
    while optimizer is not None and not isinstance(optimizer, Wrapped):
        seen.add(id(optimizer))
        inside = (getattr(optimizer, name, None) for name in _INSIDE)
        optimizer = next((one for one in inside if one is not None and id(one) not in seen), None)
    return optimizer


def begin(optimizers: Iterable[Any]) -> None:
    """Have all measured that `collect` tells: called on all ranks, before the first step.

    Args:
        optimizers: what the trainer has, as for `collect`.
    """
    for wrapped in map(wrapped_in, optimizers):
        if wrapped is not None and not wrapped.removed:
            wrapped.ask_metrics()


def collect(optimizer: Any = None, handles: Handle | Iterable[Handle] | None = None) -> dict[str, float]:
    """The metrics of an optimizer and of handles in one dict, plain floats by name.

    What no step computes by itself is measured once `begin` was called on all ranks. This neither
    communicates nor changes anything, so one rank alone may call it.

    Args:
        optimizer: what the trainer has; the optimizer that `optx.wrap` made is looked for inside of it. Of
            others, and of one whose transforms were removed, there is nothing to tell.
        handles: one or several; those that were removed (merged for good) are left out. A second one of the
            same name is called ``<name>_2``.

    Returns:
        `Wrapped.metrics`, and `Handle.metrics` of each.
    """
    wrapped = wrapped_in(optimizer)
    found = {} if wrapped is None or wrapped.removed else wrapped.metrics()
    given = () if handles is None else (handles,) if isinstance(handles, Handle) else handles
    times: dict[str, int] = {}
    for handle in given:
        if handle.removed:
            continue
        for name, value in handle.metrics().items():
            adapter, what = name.split("/", 1)
            times[name] = times.get(name, 0) + 1
            found[name if times[name] == 1 else f"{adapter}_{times[name]}/{what}"] = value
    return found


def collect_all(optimizers: Iterable[Any], handles: Iterable[Handle]) -> dict[str, float]:
    """What `collect` finds in each; a later optimizer's names have its number: ``optx_2/lr``."""
    found = collect(None, handles)
    for number, optimizer in enumerate(optimizers, 1):
        own = collect(optimizer)
        for name, value in own.items():
            owner, what = name.split("/", 1)
            found[name if number == 1 else f"{owner}_{number}/{what}"] = value
    return found
