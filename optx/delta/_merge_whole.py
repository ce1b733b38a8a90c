"""mergekit's methods that look at a whole tensor of every model at once: ranks, variances, importance.

Each computes what mergekit 0.1.5 computes, in the same order and dtype; random masks are optx's own.

Source: Model Stock, arXiv 2403.19522, section 4; Model Breadcrumbs, arXiv 2312.06795; SCE, arXiv 2408.07990;
DELLA, arXiv 2406.11617; mergekit (arcee_fusion), which names no paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.delta._merge_group import Group, Made
from optx.delta._merge_task_vectors import combined
from optx.delta._random_mask import key_of

_SAMPLE = 1_000_000  # numbers that quantiles are taken of, at most


def model_stock(group: Group) -> Made:
    """From the base towards the models' mean, the further the smaller the angle between their changes."""
    base, models = _flat(group)
    offsets = [model - base for model in models]
    cosines = list[Tensor]()
    for i, one in enumerate(offsets):
        for other in offsets[i + 1 :]:
            size = torch.norm(one, dim=-1) * torch.norm(other, dim=-1)
            cosines.append(((one * other).sum(dim=-1) / size.clamp(min=1e-6)).clamp(-1, 1))
    cosine, count = torch.stack(cosines).mean(dim=0).unsqueeze(-1), len(models)
    below = 1 + (count - 1) * cosine
    opposed = below.abs() < 1e-6  # the changes cancel out: the base stays
    share = torch.where(opposed, 0, count * cosine / torch.where(opposed, 1, below))
    mean = sum(models[1:], 0 + models[0]) / count
    return (share * mean + (1 - share) * base).reshape(group.shape)


def _flat(group: Group) -> tuple[Tensor, list[Tensor]]:
    """The base and the others: as one row, or, filter-wise, as rows."""
    assert group.base is not None
    rows = group.shared["filter_wise"]

    def shaped(i: int) -> Tensor:
        whole = group.whole(i)
        return whole.reshape(-1) if not rows else whole[None] if whole.dim() == 1 else whole

    return shaped(group.base), [shaped(i) for i in group.others]


def breadcrumbs(group: Group) -> Made:
    """Of each change neither the largest nor the smallest, summed."""
    return _breadcrumbs(group, elects=False)


def breadcrumbs_ties(group: Group) -> Made:
    """Of each change neither the largest nor the smallest, of those the ones with the elected sign."""
    return _breadcrumbs(group, elects=True)


def _breadcrumbs(group: Group, elects: bool) -> Made:
    assert group.base is not None
    base = group.whole(group.base).reshape(-1)
    kept = list[Tensor]()
    pruning = zip(group.values("density"), group.values("gamma"), strict=True)
    for i, (density, gamma) in enumerate(pruning):
        [change] = group.changes(0, base.numel(), base, only=i)
        if density >= 1:
            kept.append(change)
            continue
        n = change.numel()
        target, top = int(density * n), int(gamma * n)
        begin = max(0, n - target - top)
        size = change.abs().float()
        mask = torch.zeros_like(change)
        mask[size.sort().indices[begin : begin + target]] = 1
        kept.append(_scaled(change, change * mask, group.shared["rescale"]))
    return combined(group, base, kept, elects).view(group.shape)


def _scaled(change: Tensor, kept: Tensor, rescale: bool) -> Tensor:
    if not rescale:
        return kept
    before, after = change.abs().sum(), kept.abs().sum()
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def arcee_fusion(group: Group) -> Made:
    """The base, with the other's numbers where they are important: where they and their row differ most.

    Of more than a million numbers the bound is estimated from a million, drawn with the merge's seed.
    """
    assert group.base is not None
    [place] = group.others
    base, other = group.whole(group.base), group.whole(place)
    p, q = (torch.softmax(x, dim=-1) + 1e-8 for x in (other, base))
    importance = (other - base).abs() * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    flat = importance.reshape(-1)
    if flat.numel() > _SAMPLE:
        draws = torch.Generator().manual_seed(key_of(group.seed, group.name) >> 1)
        flat = flat[torch.randint(flat.numel(), (_SAMPLE,), generator=draws)]
    places = (torch.tensor([0.25, 0.5, 0.75]) * (flat.numel() - 1)).long()
    low, middle, high = flat.sort().values[places]
    important = importance >= middle + 1.5 * (high - low)
    return (base + (other - base) * important.float()).to(group.dtype)


def sce(group: Group) -> Made:
    """Where the changes vary most between models, their mean by energy, of those with the elected sign."""
    assert group.base is not None
    base, share = group.whole(group.base), group.shared["select_topk"]
    changes = torch.stack([change.view(group.shape) for change in group.changes(0, group.entry.numel)])
    if share < 1:
        changes = changes * _most_varied(changes, share)
    agrees = changes.sign() == (changes.sum(dim=0) >= 0).to(changes.dtype) * 2 - 1
    energy = changes.square().reshape(len(changes), -1).mean(dim=1)
    total = float(energy.sum())
    weights = torch.ones_like(energy) / len(energy) if abs(total) < 1e-6 else energy / total
    weights = weights.view(-1, *[1] * base.ndim) * agrees
    return base + (changes * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-6)


def _most_varied(changes: Tensor, share: float) -> Tensor:
    """1 for a share of the entries that differ between models at all, 0 for the others."""
    variance = torch.var(changes, dim=0, unbiased=False)
    kept, mask = int(torch.count_nonzero(variance) * max(share, 0.0)), torch.zeros_like(variance)
    if kept:
        mask.view(-1)[variance.view(-1).topk(kept).indices] = 1
    return mask


def della(group: Group) -> Made:
    """A random part of each change, the larger the likelier, of those the ones with the elected sign."""
    return _della(group, elects=True)


def della_linear(group: Group) -> Made:
    """A random part of each change, the larger the likelier, summed."""
    return _della(group, elects=False)


def _della(group: Group, elects: bool) -> Made:
    assert group.base is not None
    base = group.whole(group.base).reshape(-1)
    kept, pruning = list[Tensor](), zip(group.values("density"), group.values("epsilon"), strict=True)
    for i, (density, epsilon) in enumerate(pruning):
        [change] = group.changes(0, base.numel(), base, only=i)
        if density >= 1 or not change.numel():
            kept.append(change)
        elif density <= 0:
            kept.append(torch.zeros_like(change))
        else:
            mask = _likely(group, change, density, epsilon, i).to(change.dtype)
            kept.append(_scaled(change, change * mask, group.shared["rescale"]))
    return combined(group, base, kept, elects).view(group.shape)


def _likely(group: Group, change: Tensor, density: float, epsilon: float, i: int) -> Tensor:
    """Which are kept: with a probability between density - epsilon and + epsilon, by rank in the row."""
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise OptxError(
            f"{group.name!r}: density {density:.4g} with epsilon {epsilon:.4g} goes beyond 0 or 1; make "
            "epsilon smaller."
        )
    rows = change.view(group.shape) if len(group.shape) > 1 else change[None]
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(torch.float32)
    share = density - epsilon + ranks / max(rows.shape[1] - 1, 1) * 2 * epsilon
    if rows.shape[1] == 1:
        share = torch.full_like(share, density)
    draws = torch.Generator().manual_seed(key_of(group.seed + i, group.name) >> 1)
    return torch.bernoulli(share, generator=draws).reshape(-1)
