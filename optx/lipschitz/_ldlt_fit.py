"""Free matrices whose chain has given weights, and the smallest L for which there are some.

L is the smallest for multipliers that are one number a layer and balance the layers' norms, found by
bisection: with them every chain has an L, its norms' product or less. Multipliers of each neuron (LipSDP) may
    prove less.
"""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optx.lipschitz._ldlt_linalg import cholesky, cholesky_ex, norm, solve_triangular
from optx.lipschitz._ldlt_order import Form
from optx.lipschitz._ldlt_weights import Link, Root, Roots, pivot, row_sums, skipped, spread

MARGIN = 1e-3
"""How far above the smallest L ``L="auto"`` stays: at it, a contraction has norm 1, which no V reaches."""


@dataclass(frozen=True)
class Fit:
    """V and a = log(alpha) of every layer, and the gauges: logarithms of the multipliers' roots, by layer."""

    V: list[Tensor]
    a: list[Tensor]
    gauges: list[float]


def fit(weights: Sequence[Tensor], links: Sequence[Link], form: Form, L: float) -> Fit | None:
    """Free matrices of a chain that has these weights (float64); None: there are none at this L."""
    gauges = balanced(weights, links, form)
    C = _gauged(weights, gauges, form)
    n = len(gauges)
    V: list[Tensor] = []
    a: list[Tensor] = []
    U: list[Tensor] = []
    S = [Root(C[0].new_tensor(L))]
    for one, link in zip(C[:n], links, strict=False):
        u = _over(one, S[-1], link) / link.reach
        if (found := _free(u, link)) is None:
            return None
        U.append(u)
        V.append(found[0])
        a.append(found[1].log())
        P = (row_sums(found[0], link) + found[1]).sqrt() if link.groups else found[2]
        S.append(pivot(P, found[1], link, Roots()))
    if form == "sequential":
        ends = _free(_over(C[n], S[-1], links[n]), links[n], last=True)
        blocks = [] if ends is None else [ends[0]]
    elif form == "residual":
        gamma, sigma = skipped(U, S, links, Roots())
        A, B = C[n + 1], C[n]
        U_A = A @ cholesky(sigma)
        ends = _free(torch.cat([U_A, S[-1].over(B + A @ gamma)], 1), links[n], last=True)
        blocks = [] if ends is None else [ends[0][:, A.shape[1] :], ends[0][:, : A.shape[1]]]
    else:
        if L <= 1.0:
            return None
        gamma, _ = skipped(U, S, links, Roots())
        ends = _free(S[-1].over(C[n] + gamma) / math.sqrt(1.0 - 1.0 / L**2), links[n], last=True)
        blocks = [] if ends is None else [ends[0]]
    if ends is None:
        return None
    V += blocks
    a += [ends[1].log()] + [torch.zeros(1, dtype=torch.float64)] * (len(blocks) - 1)
    return Fit(V, a, gauges)


def smallest(weights: Sequence[Tensor], links: Sequence[Link], form: Form) -> float:
    """The least L that `fit` serves, to seven digits; inf: there is none."""
    high = 1.0
    while fit(weights, links, form, high) is None:
        high *= 4.0
        if high > 1e12:
            return math.inf
    low = 0.0
    while high - low > 1e-7 * high:
        middle = 0.5 * (low + high) if low else high / 4.0
        if fit(weights, links, form, middle) is None:
            low = middle
        elif middle < 1e-12:
            return middle
        else:
            high = middle
    return high


def balanced(weights: Sequence[Tensor], links: Sequence[Link], form: Form) -> list[float]:
    """Gauges under which every layer behind the first has norm 1 for slopes to 1: the last's included."""
    n = len(weights) - (2 if form == "residual" else 1)
    found: list[float] = []
    behind = 0.0
    for k in range(n, 0, -1):
        # At slopes to M a layer's share is 1 / M; a gauge is at the outputs of layer k - 1.
        size = _norm(weights[k], links[k]) * (links[k].high if k < n else 1.0)
        behind += math.log(max(size, 1e-30))
        found.append(behind)
    return found[::-1]


def _norm(weight: Tensor, link: Link) -> float:
    if link.groups:
        return float(row_sums(weight, link).amax().sqrt())
    return norm(weight)


def _gauged(weights: Sequence[Tensor], gauges: Sequence[float], form: Form) -> list[Tensor]:
    found: list[Tensor] = []
    for k, one in enumerate(weights):
        out = gauges[k] if k < len(gauges) else 0.0
        into = gauges[k - 1] if 0 < k <= len(gauges) else 0.0
        found.append(one * math.exp(out - into))
    return found


def _over(C: Tensor, S: Root, link: Link) -> Tensor:
    """C S^{-1}, also where one output before is several inputs."""
    if S.factor.ndim == 1:
        return C / spread(S.factor, C, link)
    return S.over(C)


def _free(U: Tensor, link: Link, last: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """V, alpha and P whose contraction is U; None: its norm is not below 1.

    For a matrix: alpha = 1, P^T P = (I - U U^T)^{-1} by a Cholesky factor of I - U U^T alone, V = P U. The
    last layer may be taken by its inputs' side. For a convolution: V = U, P = 1, alpha = 1 - t.
    """
    if link.groups:
        alpha = 1.0 - row_sums(U, link)
        return (U, alpha, torch.ones_like(alpha)) if float(alpha.amin()) > 1e-12 else None
    turned = last and U.shape[0] > U.shape[1]
    inner = U.mT if turned else U
    rest = torch.eye(len(inner), dtype=U.dtype, device=U.device) - inner @ inner.mT
    factor, info = cholesky_ex(rest)  # rest = F F^T, P = F^{-1}: lower, and P^T P = rest^{-1}
    if int(info) or not float(factor.diagonal().amin()) > 1e-6:
        return None
    eye = torch.eye(len(inner), dtype=U.dtype, device=U.device)
    P = solve_triangular(factor, eye, upper=False)
    V = solve_triangular(factor, inner, upper=False)
    return (V.mT if turned else V), torch.ones(1, dtype=U.dtype, device=U.device), P
