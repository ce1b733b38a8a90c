"""Multipliers by a method of our own: descent on the least rho, with what past gradients tell (L-BFGS).

The least rho of an inequality is a convex function of its multipliers, and finite where the hidden block is
positive definite; whatever t is found proves a bound. In s = log t, its logarithm is descended, with the
largest eigenvalue smoothed and a barrier at the end of where it is finite, both by less and less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optx.analysis.bounds._inequality import Inequality

_SMOOTHING = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of rho


def descend(problem: Inequality, start: Tensor, steps: int = 300) -> Tensor:
    """Multipliers of a small rho.

    Args:
        problem: the inequality.
        start: (multipliers,), with which some rho is enough.
        steps: of each smoothing.
    """
    s = start.log()
    for smoothing in _SMOOTHING:
        s = _lbfgs(lambda x, e=smoothing: _value(problem, x, e), s, steps)
    return s.exp()


def _value(problem: Inequality, s: Tensor, smoothing: float) -> tuple[float, Tensor]:
    """log of the smoothed rho, and its gradient."""
    s = s.detach().requires_grad_()
    with torch.enable_grad():
        found = problem.gain(s.exp())
        if found is None:
            return float("inf"), torch.zeros_like(s)
        S, depth = found
        eigenvalues = torch.linalg.eigvalsh(S)
        unit = smoothing * float(eigenvalues[-1].detach().clamp_min(1e-300)) / len(S) ** 0.5
        rho = unit * torch.logsumexp(eigenvalues / unit, 0)
        value = rho.log() - smoothing * depth / problem.size
        if not bool(value.isfinite()):
            return float("inf"), torch.zeros_like(s)
        (gradient,) = torch.autograd.grad(value, s)
    return float(value.detach()), gradient


def _lbfgs(f: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, steps: int, memory: int = 20) -> Tensor:
    """Armijo's rule by halving: the function is infinite outside of its domain."""
    value, gradient = f(x)
    pairs = list[tuple[Tensor, Tensor]]()
    for _ in range(steps):
        direction = -_times_inverse(pairs, gradient)
        slope = float(gradient @ direction)
        if not slope < 0:
            pairs, direction = [], -gradient
            slope = float(gradient @ direction)
        step = 1.0 if pairs else min(1.0, 1.0 / float(gradient.norm().clamp_min(1e-300)))
        step = min(step, 5.0 / float(direction.abs().max().clamp_min(1e-300)))
        for _ in range(40):
            new_value, new_gradient = f(x + step * direction)
            if new_value <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            if not pairs:
                break
            pairs = []
            continue
        moved, turned = step * direction, new_gradient - gradient
        if float(moved @ turned) > 1e-12 * float(moved.norm() * turned.norm()):
            pairs = [*pairs, (moved, turned)][-memory:]
        done = value - new_value < 1e-8
        x, value, gradient = x + moved, new_value, new_gradient
        if done:
            break
    return x


def _times_inverse(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The inverse Hessian that past steps tell of, times the gradient (the two-loop recursion)."""
    q = gradient.clone()
    alphas = list[Tensor]()
    for moved, turned in reversed(pairs):
        alphas.append((moved @ q) / (moved @ turned))
        q -= alphas[-1] * turned
    if pairs:
        moved, turned = pairs[-1]
        q *= (moved @ turned) / (turned @ turned)
    for (moved, turned), alpha in zip(pairs, reversed(alphas), strict=True):
        q += moved * (alpha - (turned @ q) / (moved @ turned))
    return q
