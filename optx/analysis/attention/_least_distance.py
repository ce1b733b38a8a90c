"""The shortest vector that satisfies linear inequalities, exactly: least-distance programming.

Source: Lawson and Hanson, "Solving Least Squares Problems", SIAM 1995, chapter 23: algorithms NNLS and LDP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.attention._algebra import solve

LENGTH = 1e6
"""Solutions longer than this, where the longest row of G has length 1, count as none: of the residual that
they are read from, 1 / length², rounding leaves no digit beyond."""


def least_distance(gram: Tensor) -> tuple[Tensor, bool]:
    """The multipliers of min |w|² / 2 subject to G w >= 1, from G Gᵀ; w is Gᵀ times them.

    Args:
        gram: (R, R) float64, positive semidefinite, its largest diagonal number 1.

    Returns:
        (R,), none negative, and whether there is such a w. If there is none they prove it: they sum to 1,
        and Gᵀ times them is 0, so the rows that they weigh can't all have a positive product with one vector.
    """
    # NNLS of min |E u - f| with E = [Gᵀ; 1ᵀ], f = [0; 1], by products alone: EᵀE = G Gᵀ + 1 1ᵀ, Eᵀf = 1.
    H = gram + 1.0
    u = _nonnegative(H, torch.ones(len(H), dtype=H.dtype))
    # The residual's square is 1 - sum u at the optimum, and w = (Gᵀ u) / that.
    left = float(1.0 - u.sum())
    if left * (1.0 + LENGTH**2) <= 1.0:
        return u / u.sum(), False
    return _polished(gram, u / left), True


def _nonnegative(H: Tensor, c: Tensor) -> Tensor:
    """Minimise uᵀH u / 2 - cᵀu over u >= 0, one active constraint at a time (algorithm NNLS)."""
    R = len(c)
    u, passive = torch.zeros_like(c), torch.zeros(R, dtype=torch.bool)
    slope = c.clone()
    barred = torch.zeros(R, dtype=torch.bool)
    # What rounding leaves of a slope, which is a sum of products of at most R numbers.
    least = 1e-13 * float(H.abs().amax())
    for _ in range(10 * R + 10):
        open_ = ~passive & ~barred & (slope > least)
        if not bool(open_.any()):
            return u
        new = int(torch.where(open_, slope, -torch.inf).argmax())
        passive[new] = True
        first = True
        while True:
            index = passive.nonzero()[:, 0]
            s = solve(H[index][:, index], c[index])
            if first and not float(s[int((index == new).nonzero())]) > 0.0:
                passive[new], barred[new] = False, True  # rounding alone made its slope positive
                break
            first = False
            if bool((s > 0.0).all()):
                u.zero_()
                u[index] = s
                barred.zero_()
                break
            old, down = u[index], s <= 0.0
            share = (old[down] / (old[down] - s[down])).amin()
            u[index] = (old + share * (s - old)).clamp_min(0.0)
            passive[index[down & (u[index] <= 1e-15)]] = False
        slope = c - H @ u
    raise OptxError(
        f"attention_svm: its solver found no end after {10 * R + 10} exchanges of {R} constraints: the "
        "tokens are too nearly dependent for float64."
    )


def _polished(gram: Tensor, duals: Tensor) -> Tensor:
    """The multipliers again, from the active constraints alone: G_P G_Pᵀ λ = 1, without 1 / residual²."""
    index = (duals > 0.0).nonzero()[:, 0]
    exact = duals.clone()
    active = gram[index][:, index]
    for _ in range(3):  # with steps of iterative refinement
        exact[index] += solve(active, 1.0 - active @ exact[index])
    return exact if bool((exact >= 0.0).all()) else duals
