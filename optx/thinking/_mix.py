"""One decoding step of soft thinking, as the paper's algorithm has it: filters, noise, weights.

Source: "LLMs are Single-threaded Reasoners", arXiv 2508.03440; perturbed log-probabilities as SofT-GRPO has
them, arXiv 2511.06411.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optx._gumbel import gumbel


class Limits(NamedTuple):
    """Which tokens stay of a distribution.

    Attributes:
        temperature: T.
        top_k: how many; 0: all.
        top_p: tokens before which less than this lies.
        min_p: the least, as a share of the largest.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Noise(Protocol):
    """The options that say how weights are drawn."""

    tau: float
    alpha: float
    noise_factor: float

    @property
    def kind(self) -> str | None:
        """None, ``"gumbel"`` or ``"dirichlet"``."""
        ...

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The rails of Gumbel noise, if it has any."""
        ...

    @property
    def log_floor(self) -> float:
        """What is added to pi before its log is taken."""
        ...


class Mixture(NamedTuple):
    """What a row thinks: K tokens, the heaviest first. All of shape (B, K).

    Attributes:
        ids: t.
        weights: y, float32.
        gprime: g', float32: y = softmax(g' / tau) with Gumbel noise, else log y.
        kept: pi, float32, before the noise.
    """

    ids: Tensor
    weights: Tensor
    gprime: Tensor
    kept: Tensor


def entropy(p: Tensor) -> Tensor:
    """H = -sum p ln p along the last axis, in nats (step 2)."""
    return torch.special.entr(p).sum(-1)


def entropy_of(z: Tensor) -> Tensor:
    """The same of softmax(z), for long rows: ln sum e^z - sum p z has no logarithm of each p.

    It is nan or inf where z has nan, inf or nothing but -inf.
    """
    p = z.softmax(-1)
    return (z.logsumexp(-1) - torch.linalg.vecdot(p, z.clamp_min(torch.finfo(z.dtype).min))).clamp_min(0)


def renormalised(p: Tensor) -> Tensor:
    """The same, with a sum of 1 along the last axis."""
    return p / p.sum(-1, keepdim=True)


def filtered(p: Tensor, limits: Limits) -> Tensor:
    """Top-k, then top-p of what that leaves, then min-p, renormalised after each (step 3).

    Args:
        p: (..., n) probabilities, descending.
        limits: what stays; its temperature is in p already.

    Returns:
        (..., n), 0 where a token is dropped.
    """
    if 0 < limits.top_k < p.shape[-1]:
        p = renormalised(p * (torch.arange(p.shape[-1], device=p.device) < limits.top_k))
    if limits.top_p < 1:
        before = p.cumsum(-1) - p
        p = renormalised(p * (before < limits.top_p))
    if limits.min_p > 0:
        p = renormalised(p * (p >= limits.min_p * p[..., :1]))
    return p


def candidates(logits: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The tokens that stay, (B, n), the likeliest first, and their probabilities, 0 where dropped (1, 3).

    Among equals the lowest token comes first, as in an argmax; topk alone leaves their order open.
    """
    V = logits.shape[-1]
    n = V if limits.top_k == 0 else min(limits.top_k, V)
    if n == 1:
        best = logits.argmax(-1, keepdim=True)
        return best, torch.ones_like(best, dtype=logits.dtype)
    top, ids = logits.topk(n, -1)
    if bool((top[:, 0] == top[:, -1]).any()):  # more than n may be as likely as the first of them
        best = logits.argmax(-1, keepdim=True)
        missing = (ids != best).all(-1, keepdim=True)
        ids = torch.cat([ids[:, :-1], best.where(missing, ids[:, -1:])], 1)
    ids = ids.sort(-1).values
    top, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    # A softmax over the n largest is p = softmax(z / T) renormalised over them.
    return ids.gather(-1, order), filtered((top / limits.temperature).softmax(-1), limits)


def thought(p: Tensor, ids: Tensor, K: int, options: Noise, generators: Sequence[torch.Generator]) -> Mixture:
    """Steps 4 to 7: weights of K tokens, drawn with each row's own generator.

    Args:
        p: (B, n) probabilities, descending, 0 where dropped.
        ids: (B, n) their tokens.
        K: how many are kept.
        options: how weights are drawn.
        generators: one for each row, on the CPU: so a seed gives the same noise on every device.
    """
    if options.kind == "dirichlet":
        x = dirichlet(p, options.alpha, generators)
        y, order = _largest(x, K)
        y, kept = renormalised(y), renormalised(p.gather(-1, order))
        return Mixture(ids.gather(-1, order), y, y.log(), kept)
    kept, ids = renormalised(p[..., :K]), ids[..., :K]
    scores = (kept + options.log_floor).log()
    if options.kind is None:
        return Mixture(ids, kept, kept.log(), kept)
    noise = gumbel((len(p), K), generator=generators).to(p.device)
    if options.clamp is not None:
        noise = noise.clamp(*options.clamp)
    gprime, order = (scores + options.noise_factor * noise).sort(-1, descending=True)
    weights = softmax(gprime, options.tau)
    return Mixture(ids.gather(-1, order), weights, gprime, kept.gather(-1, order))


def softmax(gprime: Tensor, tau: float) -> Tensor:
    """y = softmax(g' / tau), for any tau above 0 and with entries of -inf (step 6)."""
    return ((gprime - gprime.amax(-1, keepdim=True)) / tau).softmax(-1)


def dirichlet(p: Tensor, alpha: float, generators: Sequence[torch.Generator]) -> Tensor:
    """x ~ Dir(alpha p) on the support of p, (B, n) (step 4).

    Gamma(a) is Gamma(a + 1) u^(1 / a), taken in logs: where a is small, every draw of a row may be too small
    for a float64, and their ratios are not.
    """
    a = (alpha * p.double()).cpu()
    there = a > 0
    a = a.where(there, torch.ones(()).to(a))
    draws, waits = torch.empty_like(a), torch.empty_like(a)
    for draw, wait, shape, generator in zip(draws, waits, a + 1, generators, strict=True):
        draw.copy_(torch._standard_gamma(shape, generator=generator))  # pyright: ignore
        wait.exponential_(generator=generator)  # -ln u
    logs = draws.log() - waits / a
    return logs.where(there, torch.full_like(logs, -torch.inf)).softmax(-1).to(p)


def sampled(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One place of each row drawn from its probabilities, (B,) (step 10): one uniform number a row."""
    wide = p.double()
    u = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators]).to(p.device)
    sums = wide.cumsum(-1)
    place = torch.searchsorted(sums, (u * sums[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    return place.clamp_max((wide > 0).sum(-1) - 1)  # what is dropped is at the end, where rounding may lead


def _largest(x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    order = x.argsort(dim=-1, descending=True, stable=True)[..., :K]
    return x.gather(-1, order), order
