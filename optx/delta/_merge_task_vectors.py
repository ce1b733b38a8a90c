"""mergekit's methods of the task arithmetic family: changes pruned, weighed, elected or not, and summed.

Each computes what mergekit 0.1.5 computes, in the same order and dtype; random masks are optx's own.

Source: arXiv 2212.04089 (task arithmetic), 2306.01708 (TIES), 2311.03099 (DARE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optx.delta._combine import steady_rows
from optx.delta._merge_group import Group, Made, pieces_of
from optx.delta._random_mask import Dropout, key_of
from optx.delta.ties import TIES, Trim, trimmed

Prune = Callable[[Sequence[Tensor], int], list[Tensor]]
"""What is kept of each model's flat piece that begins at a place, unscaled."""
_LEAST = 1e-7  # a norm that nothing is scaled by


def task_arithmetic(group: Group) -> Made:
    """All changes, summed."""
    return _summed(group, lambda changes, _: list(changes), elects=False)


def ties(group: Group) -> Made:
    """The largest of each change, of those the ones with the elected sign."""
    densities = group.values("density")
    trims: list[Trim] | None = None
    if any(density < 1 for density in densities):
        trims = TIES(convention="mergekit").trims(group.as_changes(), densities)

    def prune(changes: Sequence[Tensor], begin: int) -> list[Tensor]:
        return list(changes) if trims is None else trimmed(changes, trims, begin)

    return _summed(group, _rescaled(group, prune, densities), elects=True)


def dare_linear(group: Group) -> Made:
    """A random part of each change, summed."""
    return _dare(group, elects=False)


def dare_ties(group: Group) -> Made:
    """A random part of each change, of those the ones with the elected sign."""
    return _dare(group, elects=True)


def _dare(group: Group, elects: bool) -> Made:
    densities = group.values("density")
    dropouts = [
        Dropout(key_of(group.seed + i, group.name), 1 - max(density, 0.0), 1.0) if density < 1 else None
        for i, density in enumerate(densities)
    ]

    def prune(changes: Sequence[Tensor], begin: int) -> list[Tensor]:
        return [
            change if dropout is None else torch.where(dropout.keep(begin, change.numel()), change, 0.0)
            for change, dropout in zip(changes, dropouts, strict=True)
        ]

    return _summed(group, _rescaled(group, prune, densities), elects)


def _rescaled(group: Group, prune: Prune, densities: Sequence[float]) -> Prune:
    """The same, each scaled to the L1 norm that the whole change had."""
    pruned = [i for i, density in enumerate(densities) if density < 1]
    if not group.shared["rescale"] or not pruned:
        return prune
    before, after = ([list[float]() for _ in densities] for _ in range(2))
    for begin, end in pieces_of(group.entry.numel):
        changes = group.changes(begin, end)
        kept = prune(changes, begin)
        for i in pruned:
            before[i] += steady_rows(changes[i].abs())
            after[i] += steady_rows(kept[i].abs())
    scales = [
        _ratio(math.fsum(old), math.fsum(new), group.dtype) for old, new in zip(before, after, strict=True)
    ]

    def scaled(changes: Sequence[Tensor], begin: int) -> list[Tensor]:
        kept = prune(changes, begin)
        return [one if scale is None else one * scale for one, scale in zip(kept, scales, strict=True)]

    return scaled


def _ratio(before: float, after: float, dtype: torch.dtype) -> float | None:
    """What a change is scaled by, in the rounding that norms of this dtype have."""
    if before < _LEAST or after < _LEAST:
        return None
    if dtype in (torch.float32, torch.float64):
        return before / after
    return float(torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype))


def _summed(group: Group, prune: Prune, elects: bool) -> Made:
    if not group.others:
        return group.of_base

    def piece(begin: int, end: int) -> Tensor:
        before = group.of_base(begin, end)
        return combined(group, before, prune(group.changes(begin, end, before), begin), elects)

    return piece


def combined(group: Group, base: Tensor, kept: Sequence[Tensor], elects: bool) -> Tensor:
    """The base with the changes that were kept: weighed, elected or not, and summed; all flat.

    Args:
        group: has the weights, ``normalize`` and ``lambda``.
        base: some of its numbers.
        kept: what each other model changed of these.
        elects: whether only those of the elected sign count.
    """
    weights = torch.tensor(group.values("weight"), dtype=group.dtype)[:, None]
    changes = torch.stack(list(kept)).mul_(weights)
    if elects:
        positive = changes.sum(dim=0) >= 0
        agrees = ((changes > 0) == positive).logical_and_(changes != 0)
        mixed, mass = (changes * agrees).sum(dim=0), (weights * agrees).sum(dim=0)
        mass[mass == 0] = 1
    else:
        mixed, mass = changes.sum(dim=0), weights.sum(dim=0)
        mass[mass.abs() < 1e-8] = 1
    if group.shared["normalize"]:
        mixed /= mass
    if group.shared["lambda"] != 1:
        mixed *= group.shared["lambda"]
    return base + mixed
