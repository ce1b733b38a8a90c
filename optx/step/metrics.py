"""What `Wrapped.metrics` returns: numbers of the last step, and of the groups as they are now."""

from __future__ import annotations

from collections.abc import Iterable

from optx.step.numbers import as_float
from optx.step.transform import Group, Host

OWN = "optx"  # what the names of numbers begin with that are no transform's


def collect(wrapped: Host) -> dict[str, float]:
    """All numbers by name."""
    found = rates(wrapped.param_groups)
    found[f"{OWN}/skipped_steps"] = float(wrapped.skipped_steps)
    for transform in wrapped.transforms:
        own = transform.metrics(wrapped)
        found.update({f"{transform.name}/{what}": float(value) for what, value in own.items()})
    return found


def rates(groups: Iterable[Group]) -> dict[str, float]:
    """The groups' mean lr, and each one's where they differ."""
    read = [as_float(group.get("lr")) for group in groups]
    known = {i: value for i, value in enumerate(read) if value is not None}
    if not known:
        return {}
    found = {f"{OWN}/lr": sum(known.values()) / len(known)}
    if len(set(known.values())) > 1:
        found.update({f"{OWN}/lr/{i}": value for i, value in known.items()})
    return found
