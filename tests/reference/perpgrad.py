"""perpGrad (arXiv 2501.04697, definition 7; rescaling from the official ``orthograd.py``)."""

from __future__ import annotations

from torch import Tensor


def perp(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    """The gradient without its part along ``w``, over the whole tensor."""
    left, factor = _parts(w, g, rescale)
    return left * factor


def perp_reach(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    """The sum of magnitudes of what `perp` adds up, per element: what its rounding errors scale with."""
    _left, factor = _parts(w, g, rescale)
    c = (w * g).abs().sum() / ((w * w).sum() + 1e-30)
    return (g.abs() + c * w.abs()) * factor if g.numel() > 1 else g.abs()


def _parts(w: Tensor, g: Tensor, rescale: bool) -> tuple[Tensor, float]:
    if g.numel() == 1:
        return g, 1.0  # optx's departure: a scalar has no orthogonal direction
    c = (w * g).sum() / ((w * w).sum() + 1e-30)
    left = g - c * w
    # optx's departure: what is left of a parallel gradient is rounding error.
    nearly_parallel = float(left.norm()) <= 1e-4 * float(g.norm())
    return left, 1.0 if nearly_parallel or not rescale else float(g.norm() / left.norm())
