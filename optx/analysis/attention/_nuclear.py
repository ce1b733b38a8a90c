"""The matrix of the least nuclear norm that satisfies bilinear inequalities, with a certified gap.

Source: arXiv 2308.16898, problem (Att-SVM⋆); the splitting is ADMM (Boyd et al. 2011, section 3), with
singular values soft-thresholded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.attention._algebra import inverse, length, lengths, nuclear, spectral, svd

GAP = 1e-8
"""The largest relative distance of a solution's norm from the bound that its multipliers prove."""

LOOSE = 1e-4
"""What is still given, and said, where rounding lets it come no closer."""

_STEPS = 50_000


class Certified(NamedTuple):
    """A solution, the multipliers that prove its norm, and how far that is above what they prove."""

    M: Tensor
    duals: Tensor
    gap: float


class _Rows:
    """g_r = a_r z_rᵀ, of length 1, and the least products b that M must have with them."""

    def __init__(self, A: Tensor, Z: Tensor, unit: float) -> None:
        a_long, z_long = lengths(A), lengths(Z)
        self.A, self.Z = A / a_long, Z / z_long
        self.bound = 1.0 / (a_long * z_long * unit)[:, 0]

    def of(self, M: Tensor) -> Tensor:
        return ((self.A @ M) * self.Z).sum(1)

    def back(self, y: Tensor) -> Tensor:
        return (self.A * y[:, None]).T @ self.Z

    def gram(self) -> Tensor:
        return (self.A @ self.A.T) * (self.Z @ self.Z.T)

    def certified(self, M: Tensor, duals: Tensor) -> Certified | None:
        """M made feasible by scaling, and multipliers made so: their matrix is 1 in spectral norm."""
        least, large = float((self.of(M) / self.bound).amin()), spectral(self.back(duals))
        if least <= 0.0 or large <= 0.0:
            return None
        M_, duals_ = M / least, duals / large
        value = nuclear(M_)
        return Certified(M_, duals_, (value - float(self.bound @ duals_)) / value)


def least_nuclear(A: Tensor, Z: Tensor, start: Tensor) -> Certified:
    """Minimise the nuclear norm of M subject to a_rᵀ M z_r >= 1.

    Args:
        A: (R, p) float64.
        Z: (R, q).
        start: (p, q), a matrix that satisfies all of them.

    Returns:
        M, which satisfies them; multipliers (R,), none negative; and the relative gap between M's norm and
        the lower bound of all norms, which is the multipliers' sum.
    """
    unit = length(start)  # the solution is about 1 large, and so are the steps
    rows = _Rows(A, Z, unit)
    best = _split(rows, start / unit)
    if best is None or best.gap > LOOSE:
        raise OptxError(
            f"attention_svm: the nuclear norm's gap is {best and best.gap} after {_STEPS} steps; it should "
            f"be {GAP:g}. The tokens are too nearly dependent: take fewer rows, or norm='fro'."
        )
    return Certified(best.M * unit, best.duals * unit * rows.bound, best.gap)


def _split(rows: _Rows, start: Tensor) -> Certified | None:
    """Minimise ‖L‖⋆ + [y >= b] subject to L = X and y = G X, in turns; u and v are scaled multipliers."""
    inner = inverse(torch.eye(len(rows.A), dtype=start.dtype) + rows.gram())
    rho, relax = 1.0, 1.6
    low, y = start, rows.of(start)
    u, v = torch.zeros_like(low), torch.zeros_like(y)
    best: Certified | None = None
    for step in range(1, _STEPS + 1):
        wanted = low - u + rows.back(y - v)
        x = wanted - rows.back(inner @ rows.of(wanted))  # (I + GᵀG)⁻¹, by the smaller I + G Gᵀ
        seen = rows.of(x)
        x_, seen_ = relax * x + (1 - relax) * low, relax * seen + (1 - relax) * y
        before = low, y
        parts = svd(x_ + u)
        low = parts.with_values((parts.S - 1.0 / rho).clamp_min(0.0))
        y = torch.maximum(seen_ + v, rows.bound)
        u, v = u + x_ - low, v + seen_ - y
        if step % 20:
            continue
        found = rows.certified(low, -rho * v)
        if found is not None and (best is None or found.gap < best.gap):
            best = found
            if best.gap <= GAP:
                break
        off = length(x - low) + length(seen - y)
        moved = rho * (length(low - before[0]) + length(y - before[1]))
        if step <= _STEPS // 2 and not 0.2 * moved < off < 5.0 * moved:
            change = 2.0 if off > moved else 0.5
            rho, u, v = rho * change, u / change, v / change
    return best
