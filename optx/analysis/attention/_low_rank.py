"""The nuclear norm's problem with a rank enforced: by factors, with an augmented Lagrangian.

Source: arXiv 2308.16898, (Att-SVM⋆) with rank(W) <= m; ‖W‖⋆ = min (‖K‖² + ‖Q‖²) / 2 over K Qᵀ = W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.attention._algebra import nuclear, svd

_STARTS = 5


def least_of_rank(A: Tensor, Z: Tensor, start: Tensor, rank: int) -> Tensor:
    """Minimise the nuclear norm of M, of a rank, subject to a_rᵀ M z_r >= 1; the best stationary point found.

    Args:
        A: (R, p) float64.
        Z: (R, q).
        start: (p, q), the solution of any rank.
        rank: below ``start``'s.
    """
    U, S, Vt = svd(start)
    root = S[:rank].sqrt()
    factors = (U[:, :rank] * root, Vt[:rank].T * root)
    rng = torch.Generator().manual_seed(0)  # the same starts each time; the global generator is left alone
    found = list[Tensor]()
    for number in range(_STARTS):
        spread = 0.3 * float(root.mean()) * (number > 0)
        noise = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in factors]
        M = _descended(A, Z, [x + spread * one for x, one in zip(factors, noise, strict=True)])
        least = float(((A @ M) * Z).sum(1).amin())
        if least > 1e-3:
            found.append(M / least)
    if not found:
        raise OptxError(
            f"attention_svm: no W of rank {rank} was found that separates the tokens, in {_STARTS} starts; "
            "one of any rank does. Pass a larger rank=, or none."
        )
    return min(found, key=nuclear)


def _descended(A: Tensor, Z: Tensor, factors: list[Tensor]) -> Tensor:
    K, Q = (x.contiguous().clone().requires_grad_() for x in factors)
    duals, weight = torch.zeros(len(A), dtype=A.dtype), 10.0
    with torch.enable_grad():
        for _ in range(12):
            _minimise(A, Z, K, Q, duals, weight)
            duals = _force(A, Z, K, Q, duals, weight).detach()
            weight = min(2.0 * weight, 1e4)
    return (K @ Q.T).detach()


def _force(A: Tensor, Z: Tensor, K: Tensor, Q: Tensor, duals: Tensor, weight: float) -> Tensor:
    return (duals + weight * (1.0 - ((A @ K) * (Z @ Q)).sum(1))).clamp_min(0.0)


def _minimise(A: Tensor, Z: Tensor, K: Tensor, Q: Tensor, duals: Tensor, weight: float) -> None:
    """The augmented Lagrangian, over both factors."""
    solver: Any = torch.optim.LBFGS(
        [K, Q], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def lagrangian() -> Tensor:
        solver.zero_grad()
        force = _force(A, Z, K, Q, duals, weight)
        value: Any = (K.square().sum() + Q.square().sum()) / 2 + force.square().sum() / (2 * weight)
        value.backward()
        return value

    solver.step(lagrangian)
