"""Softmax over the samples that count, with a limit on each weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-6
"""Temperatures from here on can't take a strategy's worth out of float32's range."""


def softmax_weights(worth: Tensor, counts: Tensor | None, r: float, max_weight: float | None) -> Tensor:
    """exp(worth / r), summing to 1 over those that count (all if it is not said); 0 for the others."""
    if counts is None and max_weight is None:
        return _softmax((worth if r > TINY else worth - worth.amax()) / r)
    if counts is None:
        counts = torch.ones_like(worth, dtype=torch.bool)
    top = torch.where(counts, worth, -math.inf).amax()
    score = torch.where(counts, (worth - top) / r, -math.inf)
    if max_weight is None:
        return torch.where(counts, _softmax(score), 0.0)
    return _capped(score, counts, max_weight)


def _softmax(score: Tensor) -> Tensor:
    """Torch's adds one number after the other: of ten thousand, its sum is off by more than 1e-6."""
    found = score.softmax(0)
    return found / found.sum()


def _capped(score: Tensor, counts: Tensor, limit: float) -> Tensor:
    """Softmax with no weight above limit / M: the rest goes to the others, in proportion.

    This is what maximises the same objective (mean worth less r times the divergence from uniform weights)
    under the limit. Sorted, the k highest are at the limit and the others share 1 - k limit / M; k is the
    first for which the highest of the others then stays below it. No rounds, and nothing is read from the
    device.
    """
    many = counts.sum().to(score.dtype)
    ordered, order = score.sort(descending=True)
    below = ordered.flip(0).logcumsumexp(0).flip(0)  # of each and all after it
    rank = torch.arange(len(score), device=score.device).to(score.dtype)
    fits = ((many - rank * limit) * (ordered - below).exp() <= limit) | (rank >= many - 1)
    at_limit = fits.int().argmax().to(score.dtype)
    clipped = torch.empty_like(rank).scatter_(0, order, rank) < at_limit
    share = ((many - at_limit * limit) / many).clamp_min(0)
    rest = _softmax(torch.where(clipped, -math.inf, score)) * share
    return torch.where(counts, torch.where(clipped, limit / many, rest), 0.0)
