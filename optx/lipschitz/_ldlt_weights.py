"""Weights of a chain as functions of free matrices, so that the chain is L-Lipschitz whatever these are.

Source: LDLT, arXiv 2512.05915: pivots of a block LDL^T of LipSDP's matrix. Here U = P^{-1} V with P P^T = V
V^T + alpha I, where the paper has V R^{-1} with R^T R = V^T V + alpha I: the two differ by an orthogonal
factor, both reach every U of norm below 1, and this one needs one Cholesky factor for U and for the pivot
behind it.

An activation of slopes in [low, high] makes LipSDP's matrix N (multipliers 1) have blocks 2 I, -(low + high)
C_k beside them, and 2 low high C_k^T C_k on top of the pivot before. With C_k = sqrt(2) / (high - low) U_k
S_{k-1} and K = U_k U_k^T, the pivots come out as D_k = 2 (I - K) (I + c K)^{-1}, c = 4 low high / (high -
low)^2: above 0 just where K is below I, for slopes of any signs. At [0, 1] that is the paper's 2 (I - K).
"""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from optx._errors import OptxError
from optx.lipschitz._ldlt_linalg import cholesky, cholesky_ex, solve_triangular


@dataclass(frozen=True)
class Link:
    """One layer of a chain: what doesn't train.

    Attributes:
        path: of the module.
        low: the least slope of the activation behind it; of no meaning for the last layer.
        high: the greatest.
        groups: of a convolution; 0: it is a Linear.
        step: a convolution's strides, where they leave out offsets between outputs.
        positions: how many of its inputs one output of the layer before stands for (a flattened image).
        gain: what dropout before it multiplies by at most, while it trains.
    """

    path: str
    low: float = 0.0
    high: float = 1.0
    groups: int = 0
    step: tuple[int, ...] = ()
    positions: int = 1
    gain: float = 1.0

    @property
    def c(self) -> float:
        """4 low high / (high - low)^2."""
        return 4.0 * self.low * self.high / (self.high - self.low) ** 2

    @property
    def reach(self) -> float:
        """What makes a contraction the layer's share: sqrt(2) / (high - low)."""
        return math.sqrt(2.0) / (self.high - self.low)


@dataclass(frozen=True)
class Root:
    """S with S^T S = D, a pivot or what bounds it from below.

    Attributes:
        factor: a number (S = L I), a vector (S is diagonal) or a lower triangle.
        scale: S = scale P^{-T}, or scale P^{-1} where it is not ``flipped``.
        flipped: which of the two.
    """

    factor: Tensor
    scale: Tensor | float = 1.0
    flipped: bool = True

    def times(self, U: Tensor, link: Link) -> Tensor:
        """U S."""
        if self.factor.ndim == 2:
            if self.flipped:
                return self.scale * solve_triangular(self.factor.mT, U, upper=True, left=False)
            return self.scale * solve_triangular(self.factor, U, upper=False, left=False)
        if self.factor.ndim == 0:
            return self.factor * U
        return U * spread(self.factor, U, link)

    def over(self, G: Tensor) -> Tensor:
        """G S^{-1}."""
        if self.factor.ndim == 2:
            return G @ (self.factor.mT if self.flipped else self.factor) / self.scale
        return G / self.factor


def spread(each: Tensor, weight: Tensor, link: Link) -> Tensor:
    """Numbers of the layer before's outputs, one each, along the inputs of a weight."""
    if link.groups:
        per = each.view(link.groups, 1, -1).expand(-1, weight.shape[0] // link.groups, -1)
        return per.reshape(weight.shape[0], weight.shape[1], *(1 for _ in weight.shape[2:]))
    return each.repeat_interleave(link.positions)


class Roots:
    """Cholesky factors of one pass in one dtype, and whether that was precise enough.

    What a float32 factor gets wrong goes, times its condition, into the certificate, so that above ``MOST``
    the pass is done again in float64. ``trusted`` is for where nothing can be looked at: under torch.compile.
    """

    MOST = 1e3

    def __init__(self, trusted: bool = False) -> None:
        self.trusted = trusted
        self.seen: list[Tensor] = []

    def of(self, G: Tensor) -> Tensor:
        """The lower factor of a symmetric matrix."""
        if self.trusted:
            return cholesky(G)
        P, info = cholesky_ex(G)
        with torch.no_grad():
            found = G.diagonal().amax() / P.diagonal().amin().square()
            self.seen.append(torch.where(info == 0, found, math.inf).nan_to_num(math.inf, math.inf))
        return P

    def worst(self) -> float:
        """The largest condition seen; inf where there was no factor."""
        return float(torch.stack(self.seen).amax()) if self.seen else 1.0

    @staticmethod
    def refuse(links: Sequence[Link]) -> OptxError:
        """What is said where float64 has no factor either."""
        return OptxError(
            f"LDLT: V V^T + alpha I of the chain {links[0].path!r} to {links[-1].path!r} has no Cholesky "
            "factor in float64: its V or a has inf or nan, or V outgrew every alpha. The weights can't be "
            "computed, and a projection would void the certificate. Lower the learning rate, or load an "
            "earlier state."
        )


# ---- one layer ------------------------------------------------------------------------------------------


def gram(V: Tensor, alpha: Tensor) -> Tensor:
    """V V^T + alpha I."""
    return V @ V.mT + torch.diag(alpha.expand(V.shape[0]))


def row_sums(V: Tensor, link: Link) -> Tensor:
    """t with V V^T <= diag(t) for a convolution, on images of any size, by its autocorrelation (AOL).

    An entry of V V^T between two outputs is the overlap of their kernels at their offset, so that a row's sum
    of absolute values is at most that over all offsets; zero padding takes away rows and columns, circular
    padding adds such offsets up.
    """
    groups, dims = link.groups, V.ndim - 2
    parts = V.view(groups, V.shape[0] // groups, *V.shape[1:])
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    around = [size - 1 for size in V.shape[2:]]
    sums: list[Tensor] = []
    for part in parts:
        overlap = conv(part, part, padding=around)
        for axis, (centre, step) in enumerate(zip(around, link.step or (1,) * dims, strict=True), 2):
            if step > 1:  # outputs are that far apart
                kept = torch.arange(centre % step, 2 * centre + 1, step, device=V.device)
                overlap = overlap.index_select(axis, kept)
        sums.append(overlap.abs().flatten(1).sum(1))
    return torch.cat(sums)


def contraction(V: Tensor, alpha: Tensor, link: Link, roots: Roots) -> tuple[Tensor, Tensor]:
    """U of norm below 1, and P: a triangle, or a diagonal's numbers for a convolution."""
    if link.groups:
        P = (row_sums(V, link) + alpha).sqrt()
        return V / P.view(-1, *(1 for _ in V.shape[1:])), P
    P = roots.of(gram(V, alpha))
    return solve_triangular(P, V, upper=False), P


def pivot(P: Tensor, alpha: Tensor, link: Link, roots: Roots) -> Root:
    """S of the pivot behind a layer and its activation."""
    if link.groups:
        share = 1.0 - alpha / P.square()
        return Root((2.0 * (1.0 - share) / (1.0 + link.c * share)).sqrt())
    scale = (2.0 * alpha).sqrt()
    if link.c == 0.0:
        return Root(P, scale)
    inner = (1.0 + link.c) * (P.mT @ P) - torch.diag((link.c * alpha).expand(P.shape[0]))
    return Root(roots.of(inner), scale, flipped=False)


def last(V: Tensor, alpha: Tensor, link: Link, roots: Roots) -> Tensor:
    """U of the last layer, by the smaller of the two Gram matrices: no pivot comes behind it."""
    if link.groups or V.shape[0] <= V.shape[1]:
        return contraction(V, alpha, link, roots)[0]
    return contraction(V.mT, alpha, link, roots)[0].mT


# ---- a chain ------------------------------------------------------------------------------------------


def hidden(
    V: Sequence[Tensor], alpha: Sequence[Tensor], links: Sequence[Link], L: float, roots: Roots
) -> tuple[list[Tensor], list[Tensor], list[Root]]:
    """C_k and U_k of the layers that have an activation behind them, and S_0, S_1, ...: one more."""
    S = [Root(V[0].new_tensor(L))]
    C: list[Tensor] = []
    U: list[Tensor] = []
    for one, a, link in zip(V, alpha, links, strict=True):
        u, P = contraction(one, a, link, roots)
        U.append(u)
        C.append(link.reach * S[-1].times(u, link))
        S.append(pivot(P, a, link, roots))
    return C, U, S


def sequential(
    V: Sequence[Tensor], alpha: Sequence[Tensor], links: Sequence[Link], L: float, roots: Roots
) -> list[Tensor]:
    """C_1 .. C_n and C_out."""
    C, _, S = hidden(V[:-1], alpha[:-1], links[:-1], L, roots) if len(V) > 1 else ([], [], [])
    behind = S[-1] if S else Root(V[0].new_tensor(L))
    return [*C, behind.times(last(V[-1], alpha[-1], links[-1], roots), links[-1])]


def skipped(
    U: Sequence[Tensor], S: Sequence[Root], links: Sequence[Link], roots: Roots
) -> tuple[Tensor, Tensor]:
    """Gamma_n (d_0, d_n) and Sigma (d_0, d_0), by which the branch may take from the skip.

    Where slopes are not [0, 1]'s, the pivot that is left of D_{k-1} once C_k is known is S^T (I + c U^T U) S.
    """
    size = U[0].shape[1]
    gamma = torch.eye(size, dtype=U[0].dtype, device=U[0].device)
    sigma = torch.zeros_like(gamma)
    for u, before, link in zip(U, S, links, strict=False):
        Y = before.over(gamma)
        if link.c == 0.0:
            sigma = sigma + Y @ Y.mT
            inner = Y
        else:
            eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            inner = torch.cholesky_solve(Y.mT, roots.of(eye + link.c * (u.mT @ u))).mT
            sigma = sigma + inner @ Y.mT
        gamma = (link.low + link.high) * link.reach * (inner @ u.mT)
    return gamma, sigma


def residual(
    V: Sequence[Tensor], alpha: Sequence[Tensor], links: Sequence[Link], L: float, roots: Roots
) -> list[Tensor]:
    """C_1 .. C_n, B and A of y = A x + B w_n + b: the last two V and links; the last alpha is of both.

    [U1 U2] is one contraction of the free [V_A V_B], so that A Sigma A^T + (B + A Gamma) D_n^{-1}
    (B + A Gamma)^T = U1 U1^T + U2 U2^T, which is below I: that is LipSDP's condition.
    """
    C, U, S = hidden(V[:-2], alpha[:-1], links[:-2], L, roots)
    gamma, sigma = skipped(U, S, links, roots)
    both = last(torch.cat([V[-1], V[-2]], 1), alpha[-1], links[-2], roots)
    F_ = roots.of(sigma)
    A = solve_triangular(F_, both[:, : len(sigma)], upper=False, left=False)
    return [*C, S[-1].times(both[:, len(sigma) :], links[-2]) - A @ gamma, A]


def around_identity(
    V: Sequence[Tensor], alpha: Sequence[Tensor], links: Sequence[Link], L: float, roots: Roots
) -> list[Tensor]:
    """C_1 and B of y = x + B w_1 + b at L >= 1, for slopes from 0.

    Sigma is I / L^2 and Gamma is C_1^T / L^2 times the greatest slope: B = sqrt(1 - 1/L^2) U_B S_1 - Gamma.
    At L = 1 nothing of the first is left, and B = -C_1^T at slope 1: the layer of SLL.
    """
    C, U, S = hidden(V[:1], alpha[:1], links[:1], L, roots)
    gamma, _ = skipped(U, S, links[:1], roots)
    if len(V) == 1:
        return [*C, -gamma]
    U_B = last(V[1], alpha[1], links[1], roots)
    return [*C, math.sqrt(1.0 - 1.0 / L**2) * S[-1].times(U_B, links[1]) - gamma]
