"""What the recover recipe measures and solves: matrices, their measurements, and the other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DATA = {"outliers": "30 % gross outliers", "clean": "clean", "noise": "Gaussian noise"}


@dataclass(frozen=True)
class Arm:
    """One way to recover a matrix.

    Attributes:
        data: what is wrong with the measurements, see `DATA`.
        method: ``"subgm"``, ``"l2"``, ``"adam"`` or ``"huber"``.
        alpha: scale of the start.
        rank: columns of U; None: as many as rows.
        rho: of SubGM's geometric steps; 1: constant ones.
        eta0: the first step, or the rate.
        mode: SubGM's.
    """

    data: str = "outliers"
    method: str = "subgm"
    alpha: float = 1e-3
    rank: int | None = None
    rho: float = 0.98
    eta0: float = 0.25
    mode: Any = "geometric"


ARMS = {
    "subgm": Arm(),
    "subgm start 0.1": Arm(alpha=1e-1),
    "subgm start 1e-2": Arm(alpha=1e-2),
    "subgm start 1e-5": Arm(alpha=1e-5),
    "subgm start 1e-8": Arm(alpha=1e-8),
    "subgm rank 2": Arm(rank=2),
    "subgm rank 5": Arm(rank=5),
    "constant steps": Arm(rho=1.0, eta0=0.05),
    "l2": Arm(method="l2", eta0=0.05),
    "adam on l1": Arm(method="adam", eta0=0.1),
    "huber (scipy)": Arm(method="huber"),
    "clean: polyak": Arm("clean", eta0=0.3, mode="polyak"),
    "clean: polyak start 1": Arm("clean", eta0=0.3, mode="polyak", alpha=1.0),
    "noise: subgm": Arm("noise"),
    "noise: l2": Arm("noise", "l2", eta0=0.05),
}


@dataclass(frozen=True)
class Problem:
    """Measurements of a matrix: A (m, d, d), y (m,) and the matrix."""

    A: Tensor
    y: Tensor
    truth: Tensor

    def error(self, U: Tensor) -> float:
        """|U U^T - X| / |X|."""
        U = U.detach()
        return float((U @ U.t() - self.truth).norm() / self.truth.norm())


def drawn(data: str, seed: int, args: Any) -> Problem:
    """A projector of rank ``args.rank``, measured by Gaussian matrices."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    basis = torch.linalg.qr(normal(args.size, args.rank))[0]
    truth, A = basis @ basis.t(), normal(args.measurements, args.size, args.size)
    wrong = {"outliers": args.outlier * normal(args.measurements), "noise": 0.5 * normal(args.measurements)}
    hit = torch.rand(args.measurements, generator=draws) < (args.share if data == "outliers" else 1.0)
    y = A.flatten(1) @ truth.flatten()
    return Problem(A, y + hit * wrong[data] if data in wrong else y, truth)


def squares(problem: Problem, U: Tensor) -> Tensor:
    """Least squares' loss."""
    return (problem.A.flatten(1) @ (U @ U.t()).flatten() - problem.y).square().mean() / 2


def by_huber(problem: Problem, start: Tensor, steps: int) -> list[float]:
    """SciPy's least squares with Huber's loss, from the same start; the error after it, twice."""
    from scipy.optimize import least_squares

    flat, shape = problem.A.flatten(1), start.shape
    both = problem.A + problem.A.transpose(1, 2)

    def residuals(x: Any) -> Any:
        U = torch.from_numpy(x).view(shape)
        return (flat @ (U @ U.t()).flatten() - problem.y).numpy()

    def slopes(x: Any) -> Any:
        return (both @ torch.from_numpy(x).view(shape)).flatten(1).numpy()

    found = least_squares(
        residuals, start.detach().flatten().numpy(), slopes, loss="huber", f_scale=0.1, max_nfev=steps
    )
    return [problem.error(start), problem.error(torch.from_numpy(found.x).view(shape))]
