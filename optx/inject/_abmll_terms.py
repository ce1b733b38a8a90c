"""Normal weights whose means and deviations are low-rank products: deviation of an output, divergence, prior.

No (out, in) matrix outlives the function that makes it, a block of rows at a time; backward makes it again.

Source: ABMLL, arXiv 2508.14285, section 3; the hyper-prior is that of ABML (Ravi & Beatson, ICLR 2019).
"""

# A and B are LoRA's letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optx.inject._weights import in_sum_precision

FLOOR = 1e-6
"""The smallest deviation of ``sigma_param="abs"``."""

_BLOCK = 2**21  # numbers of a block of rows: 8 MiB of float32


class Factors(NamedTuple):
    """The pairs of one layer: means are B_mean A_mean, and deviations made of B_std A_std.

    Attributes:
        A_mean: (rank, in).
        B_mean: (out, rank).
        A_std: (rank, in).
        B_std: (out, rank).
    """

    A_mean: Tensor
    B_mean: Tensor
    A_std: Tensor
    B_std: Tensor

    def wide(self) -> Factors:
        """In the precision of sums."""
        return Factors(*map(in_sum_precision, self))


def deviations(A: Tensor, B: Tensor, c: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """sigma of some rows, and its derivative by B A.

    Args:
        A: (rank, in).
        B: (rows, rank).
        c: what sigma is where B A is 0; a number above 0.
        kind: ``"softplus"``: softplus(B A + softplus^-1(c)); ``"abs"``: abs(B A + c), at least `FLOOR`.
    """
    if kind == "abs":
        raw = B @ A + c
        return raw.abs().clamp_min(FLOOR), raw.sign() * (raw.abs() > FLOOR)
    raw = B @ A + (c + torch.log(-torch.expm1(-c)))
    return torch.nn.functional.softplus(raw), raw.sigmoid()


def _blocks(B: Tensor, A: Tensor) -> Iterator[slice]:
    """Rows of an (out, in) matrix, so many at a time that they take little memory."""
    rows = max(1, _BLOCK // max(1, A.shape[1]))
    for first in range(0, len(B), rows):
        yield slice(first, min(first + rows, len(B)))


def output_deviation(x: Tensor, factors: Factors, c: Tensor, kind: str) -> Tensor:
    """sqrt(x^2 (sigma^2)^T): the deviation of each output where the weights are independent normals.

    Args:
        x: (..., in).
        factors: of the layer.
        c: see `deviations`.
        kind: likewise.

    Returns:
        (..., out), float32 at least.
    """
    x = in_sum_precision(x)
    A, B = (in_sum_precision(t).to(x.dtype) for t in (factors.A_std, factors.B_std))
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, A.shape[1])
        flat = cast(Tensor, _OutputDeviation.apply(rows, A, B, c.to(x.dtype), kind))  # pyright: ignore[reportUnknownMemberType]
    return flat.view(*x.shape[:-1], len(B))


class _OutputDeviation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, c: Tensor, kind: str) -> Tensor:
        square = x.square()
        parts = [square @ deviations(A, B[rows], c, kind)[0].square().t() for rows in _blocks(B, A)]
        std = torch.cat(parts, 1).sqrt()
        ctx.save_for_backward(x, A, B, c, std)
        ctx.kind = kind
        return std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A, B, c, std = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            # An output without deviation (of an input of zeros) has none to learn by.
            variance = torch.where(std > 0, grad / (2 * std), 0.0)
            square, to_square = x.square(), torch.zeros_like(x)
            to_A, to_B = torch.zeros_like(A), torch.zeros_like(B)
            for rows in _blocks(B, A):
                sigma, slope = deviations(A, B[rows], c, ctx.kind)
                to_square += variance[:, rows] @ sigma.square()
                raw = (variance[:, rows].t() @ square) * (2 * sigma * slope)
                to_B[rows] = raw @ A.t()
                to_A += B[rows].t() @ raw
            return 2 * x * to_square, to_A, to_B, None, None


# ---- terms of the loss ------------------------------------------------------------------------------


def divergence(posterior: Factors, prior: Factors, c: Tensor, kind: str) -> Tensor:
    """KL(q || p) of the weights of a layer: sum of log(s/t) + (t^2 + (m - n)^2) / (2 s^2) - 1/2.

    Here q has means m and deviations t (the posterior), p means n and deviations s. The sum is float32 at
    least, whatever the factors are.
    """
    with torch.autocast(c.device.type, enabled=False):
        return _Divergence.apply(in_sum_precision(c), kind, *posterior.wide(), *prior.wide())  # pyright: ignore


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, kind: str, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(c, *factors)
        ctx.kind = kind
        q, p = Factors(*factors[:4]), Factors(*factors[4:])
        total = torch.zeros_like(c)
        for rows in _blocks(q.B_mean, q.A_mean):
            t, s = (deviations(one.A_std, one.B_std[rows], c, kind)[0] for one in (q, p))
            z = (q.B_mean[rows] @ q.A_mean - p.B_mean[rows] @ p.A_mean) / s
            away = (t - s) / s  # log(t/s) and (t/s)^2 - 1 cancel near 0, and this does not
            total += (away - away.log1p() + (away.square() + z.square()) / 2).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        c, *factors = ctx.saved_tensors
        q, p = Factors(*factors[:4]), Factors(*factors[4:])
        of_prior = any(ctx.needs_input_grad[6:])
        found = [torch.zeros_like(t) for t in factors]
        with torch.autocast(c.device.type, enabled=False):
            for rows in _blocks(q.B_mean, q.A_mean):
                (t, slope_t), (s, slope_s) = (
                    deviations(one.A_std, one.B_std[rows], c, ctx.kind) for one in (q, p)
                )
                z = (q.B_mean[rows] @ q.A_mean - p.B_mean[rows] @ p.A_mean) / s
                r, mean = t / s, grad * z / s
                _chain(found[0:2], q.A_mean, q.B_mean, rows, mean)
                _chain(found[2:4], q.A_std, q.B_std, rows, grad * (r - 1 / r) * (slope_t / s))
                if of_prior:
                    _chain(found[4:6], p.A_mean, p.B_mean, rows, -mean)
                    raw = grad * (1 - r.square() - z.square()) * (slope_s / s)
                    _chain(found[6:8], p.A_std, p.B_std, rows, raw)
        return None, None, *found[:4], *(found[4:] if of_prior else [None] * 4)


def surprise(prior: Factors, c: Tensor, kind: str, a0: float, b0: float | None) -> Tensor:
    """-log p(theta) of a layer: means are N(0, 1), and precisions sigma^-2 Gamma(a0, rate b0).

    Args:
        prior: theta's factors.
        c: see `deviations`.
        kind: likewise.
        a0: shape.
        b0: rate; None: a0 c^2, so that the mean precision is that of the start, c^-2.
    """
    with torch.autocast(c.device.type, enabled=False):
        return _Surprise.apply(in_sum_precision(c), kind, a0, b0, *prior.wide())  # pyright: ignore


class _Surprise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, kind: str, a0: float, b0: float | None, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(c, *factors)
        ctx.kind, ctx.a0, ctx.b0 = kind, a0, b0
        p, rate = Factors(*factors), _rate(c, a0, b0)
        fixed = math.log(2 * math.pi) / 2 + math.lgamma(a0) - a0 * rate.log()
        total = fixed * p.B_mean.shape[0] * p.A_mean.shape[1]
        for rows in _blocks(p.B_mean, p.A_mean):
            mean, sigma = p.B_mean[rows] @ p.A_mean, deviations(p.A_std, p.B_std[rows], c, kind)[0]
            gamma = 2 * (a0 - 1) * sigma.log() + (rate.sqrt() / sigma).square()
            total = total + (mean.square() / 2 + gamma).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        c, *factors = ctx.saved_tensors
        p, rate = Factors(*factors), _rate(c, ctx.a0, ctx.b0)
        found = [torch.zeros_like(t) for t in factors]
        with torch.autocast(c.device.type, enabled=False):
            for rows in _blocks(p.B_mean, p.A_mean):
                _chain(found[0:2], p.A_mean, p.B_mean, rows, grad * (p.B_mean[rows] @ p.A_mean))
                sigma, slope = deviations(p.A_std, p.B_std[rows], c, ctx.kind)
                gamma = (ctx.a0 - 1) - (rate.sqrt() / sigma).square()
                _chain(found[2:4], p.A_std, p.B_std, rows, 2 * grad * gamma * (slope / sigma))
        return None, None, None, None, *found


def _rate(c: Tensor, a0: float, b0: float | None) -> Tensor:
    return a0 * c.square() if b0 is None else torch.full_like(c, b0)


def _chain(found: list[Tensor], A: Tensor, B: Tensor, rows: slice, product: Tensor) -> None:
    """Add the gradient by some rows of B A to those by A and B."""
    found[0].add_(B[rows].t() @ product)
    found[1][rows] = product @ A.t()
