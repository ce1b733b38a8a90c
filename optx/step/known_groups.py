"""What an optimizer's groups held when they were last looked at, against what was put into them by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from optx.step.transform import Group

Known = list[tuple[Group, list[Tensor]]]
"""Every group, with the parameters that it had."""


def replaced(known: Known, groups: Sequence[Group]) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters that left, each with the one in its place that is new to the optimizer."""
    was = {id(p) for _, params in known for p in params}
    now = {id(p) for group in groups for p in group["params"]}
    for i, group in enumerate(groups):
        for old, new in zip(known_of(known, i, group), group["params"], strict=False):
            if id(new) not in was and id(old) not in now:
                yield old, new


def gone(known: Known, groups: Sequence[Group]) -> list[Tensor]:
    """Parameters that are in no group any more."""
    now = {id(p) for group in groups for p in group["params"]}
    return [p for key, p in {id(p): p for _, params in known for p in params}.items() if key not in now]


def known_of(known: Known, index: int, group: Group) -> list[Tensor]:
    """What a group's parameters were, if there are as many of them: groups may have been reordered."""
    same = [params for other, params in known if other is group]
    same += [known[index][1]] if not same and index < len(known) else []
    return same[0] if same and len(same[0]) == len(group["params"]) else []
