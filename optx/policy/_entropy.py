"""Entropies of squashed Gaussians, and distances between Gaussians that bound a mixture's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_REACH, _STEP = 8.5, 1 / 16  # deviations; the rest of a Gaussian is 2e-17


def squash_entropy(means: Tensor, log_stds: Tensor) -> Tensor:
    """E[log(1 - tanh(u)^2)], u ~ N(mean, std^2): what tanh adds to an entropy; elementwise.

    By the trapezoidal rule, whose error falls with exp(-2 pi d / step) where the nearest pole is at a
    distance d of pi / (2 std): below 1e-8 up to std = e^2, the largest that a policy has by default.
    """
    nodes = torch.arange(-_REACH, _REACH + _STEP, _STEP, dtype=means.dtype, device=means.device)
    weights = (-0.5 * nodes * nodes).exp() * (_STEP / math.sqrt(2 * math.pi))
    u = means[..., None] + log_stds.exp()[..., None] * nodes
    return (2 * (math.log(2) - u - F.softplus(-2 * u)) * weights).sum(-1)


def between_gaussians(means: Tensor, log_stds: Tensor) -> tuple[Tensor, Tensor]:
    """Bhattacharyya's distance and Kullback-Leibler's divergence of each pair, twice (..., K, K).

    Args:
        means: (..., K, n).
        log_stds: (..., K, n).
    """
    apart = means[..., :, None, :] - means[..., None, :, :]
    one, other = log_stds[..., :, None, :], log_stds[..., None, :, :]
    ratio = one - other
    total = torch.logaddexp(2 * one, 2 * other)  # variances can be beyond the range of float32
    near = ((apart * (-0.5 * total).exp()).square() / 2 + total - math.log(2) - one - other) / 2
    divergence = 0.5 * ((2 * ratio).exp() + (apart * (-other).exp()).square() - 1) - ratio
    return near.sum(-1), divergence.sum(-1)
