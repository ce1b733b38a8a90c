"""The generalised Gaussian: its moments, its density, and the shape that fits many numbers pooled.

Of shape nu and scale alpha, f(w) = nu / (2 alpha Gamma(1/nu)) exp(-|w/alpha|^nu): Laplace's at nu = 1, the
normal one at nu = 2. Trained weights have a nu below 2.

Source: arXiv 2506.00486, section 3; the grid and the ratio of moments are the authors' code's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx._errors import OptxError

SHAPES = tuple(k / 100 for k in range(10, 300))
"""The shapes that a fit chooses from: 0.10, 0.11, ..., 2.99."""

_PIECE = 1 << 20  # numbers that are widened to float64 at a time


def moment_ratio(shape: float) -> float:
    """E[w^2] / E[|w|]^2, which falls from infinity to 4/3 as the shape grows.

    Args:
        shape: nu, above 0.

    Example:
        >>> [round(moment_ratio(nu), 5) for nu in (0.5, 1.0, 1.5, 2.0)]
        [3.33333, 2.0, 1.69814, 1.5708]
    """
    a, b, c = (math.lgamma(k / shape) for k in (1, 2, 3))
    return math.exp(a + c - 2 * b)


RATIOS: npt.NDArray[np.float64] = np.array([moment_ratio(shape) for shape in SHAPES])
"""`moment_ratio` of each of `SHAPES`."""


def fit_shape(absolute: float, square: float, count: float) -> float:
    """The shape of `SHAPES` whose ratio of moments is the nearest to that of some numbers, not centred.

    Args:
        absolute: the sum of their absolute values.
        square: the sum of their squares.
        count: how many there are.

    Returns:
        nu; the smaller of two that are as near. Of numbers that are all 0, which have no ratio, the largest,
        as of all numbers of one size.

    Raises:
        OptxError: there are no numbers, or a sum is not finite.

    Example:
        >>> fit_shape(4.2 - 0.8, 2.54, 8)  # 1, -1, 0.5, -0.5, 0.1, -0.1, 0.1, -0.1
        1.35
    """
    _check(absolute, square, count)
    if absolute == 0.0 or square == 0.0:
        return SHAPES[-1]
    # Divided first: the square of a sum may overflow where the mean's does not, or vanish.
    mean = absolute / count
    return SHAPES[int(np.abs(RATIOS - square / count / mean / mean).argmin())]


def fit_scale(shape: float, square: float, count: float) -> float:
    """The scale alpha with which a shape has the second moment of some numbers.

    Args:
        shape: nu.
        square: the sum of their squares.
        count: how many there are.

    Raises:
        OptxError: there are no numbers, or the sum is not finite.

    Example:
        >>> round(fit_scale(2.0, 8.0, 8), 6)  # a variance of 1
        1.414214
    """
    _check(0.0, square, count)
    return math.sqrt(square / count) * unit_scale(shape)


def unit_scale(shape: float) -> float:
    """The scale of a shape at a variance of 1.

    Example:
        >>> [round(0.02**0.5 * unit_scale(nu), 8) for nu in (1.0, 0.5)]
        [0.1, 0.01290994]
    """
    return math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)


def density(w: Tensor, shape: float, scale: float) -> Tensor:
    """f at each element of ``w``, in its dtype.

    Args:
        w: floating-point, any shape.
        shape: nu, above 0.
        scale: alpha, above 0.

    Example:
        >>> density(torch.tensor([0.0, 1.0]), shape=1.0, scale=1.0)
        tensor([0.5000, 0.1839])
    """
    top = shape / (2 * scale * math.exp(math.lgamma(1 / shape)))
    return top * torch.exp(-((w / scale).abs() ** shape))


def pooled_sums(tensors: Iterable[Tensor]) -> tuple[float, float, int]:
    """What a fit takes of all numbers of some tensors: the sums of |w| and of w^2, and how many there are.

    In float64 whatever the dtypes are, a million numbers at a time.

    Args:
        tensors: floating-point, any shapes, on any devices.

    Example:
        >>> pooled_sums([torch.tensor([1.0, -2.0]), torch.tensor([[2.0]])])
        (5.0, 9.0, 3)
    """
    absolute = square = 0.0
    count = 0
    for t in tensors:
        flat = t.detach().reshape(-1)
        count += len(flat)
        for start in range(0, len(flat), _PIECE):
            wide = flat[start : start + _PIECE]
            wide = wide.to("cpu" if wide.device.type == "mps" else wide.device, torch.float64)
            absolute += float(wide.abs().sum())
            square += float(wide.dot(wide))
    return absolute, square, count


def _check(absolute: float, square: float, count: float) -> None:
    if count < 1:
        raise OptxError(
            "The shape of a generalised Gaussian can't be fitted to no numbers; give at least one."
        )
    if not (math.isfinite(absolute) and math.isfinite(square)):
        raise OptxError(
            f"The shape of a generalised Gaussian can't be fitted: the sums of |w| and w^2 are {absolute} "
            f"and {square}, so some number is infinite, nan or too large; leave it out."
        )
