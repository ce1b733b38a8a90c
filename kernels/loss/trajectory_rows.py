"""The trajectory loss of rows of logits, in torch operations.

This is the reference of the compiled pass (`trajectory_cpu`), and the path itself where that does not serve:
on other devices, for many classes, for tensor subclasses.

Source: "Sharpness-Aware Training for Free", arXiv 2205.14083, equations 8 and 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -65504.0
"""Logits lie at most so far below the largest one (float16's range): what is masked by -inf has no NaN."""


def centred(logits: Tensor) -> Tensor:
    """Logits less their largest one, in float32 (float64 stays): what softmax takes is the same.

    Small storage formats are finest near 0, which is where the probable classes then are.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (z - z.amax(-1, keepdim=True)).clamp_min_(LOWEST)


def divergence(z: Tensor, past: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(past / tau) || softmax(z / tau)) over the last dimension, one number a position.

    tau^2 is in the paper's code and not in its equation; without it the gradient, tau (p - q), would be tau^2
    times smaller. Logarithms are not taken of probabilities, which may underflow.
    """
    log_q = torch.log_softmax(past / tau, -1)
    return (log_q.exp() * (log_q - torch.log_softmax(z / tau, -1))).sum(-1) * tau**2


@torch.no_grad()
def sums(z: Tensor, past: Tensor, tau: float, serves: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of divergences and p - q, in few operations."""
    z, past = centred(z), centred(past)
    log_q = torch.log_softmax(past.to(z.dtype) / tau, -1)
    log_p = torch.log_softmax(z / tau, -1)
    q = log_q.exp()
    losses = log_q.sub_(log_p).mul_(q).sum(-1)  # not vecdot, which autocast would round
    good = losses.isfinite() if serves is None else losses.isfinite() & serves
    gradient = log_p.exp_().sub_(q).masked_fill_(~good.unsqueeze(-1), 0.0)
    return losses.masked_fill_(~good, 0.0).sum(), gradient
