"""Step counters of transforms: which steps count, and how a rule's number comes to say so."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from optx._names import whole
from optx._rules import rule
from optx.step.group_numbers import rule_numbers
from optx.step.numbers import as_float
from optx.step.transform import Group

ADVANCES = "optx.advances"  # 1 in a step that counts, else 0: a number of the group


@rule(writes="count")
def advance(count: float, advances: float) -> float:
    """One step more."""
    return count + advances


def step_numbers(group: Group, names: Collection[str]) -> dict[str, float | Tensor]:
    """The group's numbers of those names, as `rule_numbers` has them, and whether this step counts.

    Raises:
        OptxError: one of them is no number any more.
    """
    if ADVANCES not in names:
        return rule_numbers(group, names)
    numbers = rule_numbers(group, [name for name in names if name != ADVANCES])
    return {name: float(counts(group)) if name == ADVANCES else numbers[name] for name in names}


def counts(group: Group) -> bool:
    """Whether a step is one: torch's distributed checkpoint calls ``step()`` with lr 0 and zero gradients.

    A learning rate that lies on a GPU is not read: that would wait for the device, and checkpoint's is on
    the CPU.
    """
    lr = group.get("lr", 1.0)
    if (isinstance(lr, Tensor) and lr.device.type != "cpu") or as_float(lr) != 0.0:
        return True
    grads = [p.grad for p in group["params"] if p.grad is not None]
    dense = [g if g.layout == torch.strided else g.coalesce().values() for g in grads]
    # Every gradient, on every rank, each completed over its mesh: all ranks must come to one verdict.
    return sum(int(whole((g != 0).sum())) for g in dense) > 0
