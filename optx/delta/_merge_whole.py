"""mergekit's methods that look at a whole tensor of every model at once: angles, ranks, importance.

Each computes what mergekit 0.1.5 computes, in the same order and dtype.

Source: Model Stock, arXiv 2403.19522, section 4; Model Breadcrumbs, arXiv 2312.06795; mergekit (nuslerp,
arcee_fusion), which has no paper of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def nuslerp(group: Group) -> Made:
    """Along the arc between two models, or between two changes of a base."""
    weights = group.values("weight")
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    one, other = (group.whole(i) for i in group.others)
    base = None if group.base is None else group.whole(group.base)
    if base is not None:
        one, other = one - base, other - base
    flatten, across = group.shared["nuslerp_flatten"], group.shared["nuslerp_row_wise"]
    if flatten:
        one, other = one.reshape(-1), other.reshape(-1)
    elif across:
        one, other = one.transpose(0, -1), other.transpose(0, -1)
    turned = _arc(one, other, t)
    turned = (turned.transpose(0, -1) if across and not flatten else turned).reshape(group.shape)
    return turned if base is None else base + turned


def _arc(one: Tensor, other: Tensor, t: float) -> Tensor:
    a, b = (x / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-7) for x in (one, other))
    cosine = torch.sum(a * b, dim=-1, keepdim=True).clamp(-1, 1)
    line = (1 - cosine.square()) <= 1e-16
    angle = torch.acos(torch.where(line, 0, cosine))
    arc = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)
    return torch.where(line, (1 - t) * one + t * other, arc)


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
    for change, (density, gamma) in zip(group.changes(0, base.numel(), base), pruning, strict=True):
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
