"""First factors near 0, from which a factored matrix grows to the rank that the data has.

Source: Ma, Fattahi, arXiv 2202.08788 (spectral direction, small scale); the normalisation is the largest
singular value's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range


@torch.no_grad()
def small_init_(
    U: Tensor,
    alpha: float = 1e-3,
    direction: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a factor U of U U^T with small numbers, in place.

    With a direction B, U = alpha B / ||B||_2 (the largest singular value); without, U has independent normal
    entries of variance alpha^2 / d. The error that a sub-gradient method ends with falls with alpha, and the
    steps that it takes to leave 0 grow with log(1 / alpha).

    Args:
        U: (d, r), float32 or float64; smaller dtypes lose the products of its entries.
        alpha: its scale, above 0: 1e-3 to 1e-6.
        direction: (d, r), as `optx.RobustRecoveryLoss.spectral` finds it.
        generator: of the random entries.

    Returns:
        U.

    Raises:
        ShapeError: U is no matrix, or direction has another shape.
        OptxError: alpha out of range, a dtype of half precision, a direction that is 0 or not finite.

    Example:
        >>> import torch, optx
        >>> U = optx.scaling.small_init_(torch.empty(4, 2), alpha=1e-3, direction=torch.eye(4)[:, :2])
        >>> U[0]
        tensor([0.0010, 0.0000])

    Paper values:
        ``alpha=1e-3``: the error of a recovery then ends near 1e-4, in the recipe (the default).
        ``alpha=1e-5``: nearer still, with steps that fall more slowly.

    Limits: For U U^T. Of U V^T both factors are filled, each with a seed of its own.

    Keywords: small initialisation, spectral initialisation, over-parameterisation, implicit bias.

    Evidence: ``optx run recover``; ``test_robust_recovery.py``.

    Source: arXiv 2202.08788.
    """
    check_range("small_init_", "alpha", alpha, 0)
    if not alpha:
        raise OptxError("small_init_: alpha is 0, from where nothing grows; it must be above 0, as 1e-3.")
    if U.ndim != 2:
        raise ShapeError(f"small_init_: U has shape {tuple(U.shape)}; it must be a matrix (d, r).")
    if U.dtype not in (torch.float32, torch.float64):
        raise OptxError(
            f"small_init_: U is {U.dtype}; it must be float32 or float64, for entries near {alpha:g}."
        )
    if direction is None:
        return U.copy_(torch.randn(U.shape, generator=generator, dtype=U.dtype) * (alpha / len(U) ** 0.5))
    if direction.shape != U.shape:
        raise ShapeError(
            f"small_init_: direction has shape {tuple(direction.shape)}, and U {tuple(U.shape)}; they must "
            "be one."
        )
    largest = float(torch.linalg.matrix_norm(direction.double(), 2))
    if not 0.0 < largest < float("inf"):
        raise OptxError(f"small_init_: direction has norm {largest}; it must be finite and not 0.")
    return U.copy_(direction.to(U) * (alpha / largest))
