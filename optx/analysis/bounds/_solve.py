"""Multipliers by a solver of cvxpy's, and the bound that they prove."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.bounds._first_order import descend
from optx.analysis.bounds._inequality import Inequality

OWN = "first-order"
_CLARABEL_ROWS = 100  # above, the method of our own finds as small a bound, in a tenth of the time and memory
_ROWS, _OWN_ROWS = 400, 1500  # above, a solve takes from tens of minutes on
_OPTIONS: dict[str, dict[str, Any]] = {"SCS": {"eps": 1e-6, "max_iters": 20_000}}
# How far solutions are moved into the inside, where the inequality is strict.
_INWARD = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Solved:
    """One inequality's bound.

    Attributes:
        bound: certified.
        solver: whose multipliers proved it.
        status: what the solver said.
    """

    bound: float
    solver: str
    status: str


def solver_for(rows: int, wanted: str | None, max_rows: int | None) -> str:
    """The solver of an inequality of so many rows; raises where there is none, or it would take too long."""
    if wanted is None:
        small = rows <= _CLARABEL_ROWS and importlib.util.find_spec("cvxpy") is not None
        solver = "CLARABEL" if small and "CLARABEL" in _installed() else OWN
    elif wanted == OWN:
        solver = OWN
    else:
        solver = wanted.upper()
        if importlib.util.find_spec("cvxpy") is None:
            raise OptxError(
                f"lipschitz: solver is {wanted!r}, and cvxpy is not installed. pip install cvxpy clarabel "
                f"scs, or pass solver={OWN!r}, which needs neither."
            )
        if solver not in _installed():
            raise OptxError(f"lipschitz: solver is {wanted!r}; it must be {OWN!r} or one of {_installed()}.")
    most = max_rows if max_rows is not None else _OWN_ROWS if solver == OWN else _ROWS
    if rows > most:
        raise OptxError(
            f"lipschitz: the inequality has {rows} rows (inputs that are told apart, and hidden units), "
            f"above {most}, and {solver} would take very long. Pass split=2 to cut the network, "
            f"method='product', solver={OWN!r}, or a larger max_rows."
        )
    return solver


def _installed() -> list[str]:
    import cvxpy

    return list(cvxpy.installed_solvers())


def solve(problem: Inequality, solver: str) -> Solved:
    """The bound of an inequality.

    Raises:
        OptxError: the solver ended early or found nothing, with its status; or what it found proves nothing.
    """
    if not problem.multipliers:
        return Solved(problem.scale * (1 + 1e-13), "none", "linear")
    inside = problem.inside()
    if solver == OWN:
        if inside is None:
            raise OptxError(
                "lipschitz: no multipliers are known from which the first-order method could begin, as the "
                "network feeds an activation with itself; pass solver='CLARABEL'."
            )
        t, status = descend(problem, inside), "descended"
    else:
        t, status = _multipliers(problem, solver)
    rho = _certified(problem, t, inside)
    if rho is None:
        raise OptxError(
            f"lipschitz: {solver} ended with {status!r}, but its multipliers prove no bound in float64. "
            f"Pass another solver ('CLARABEL', 'SCS', {OWN!r}), or method='product'."
        )
    return Solved(problem.scale * rho**0.5 * (1 + 1e-15), solver, status)


def _certified(problem: Inequality, t: Tensor, inside: Tensor | None) -> float | None:
    """The least rho that the multipliers, or a point near them, are seen to prove."""
    proofs = list[float]()
    for share in _INWARD if inside is not None else _INWARD[:1]:
        near = t if inside is None else (1 - share) * t + share * inside
        rho = problem.least_rho(near)
        if not np.isfinite(rho) or (proofs and rho >= min(proofs)):
            continue
        near = problem.balanced(near)
        for more in (1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
            if problem.holds(near, rho * (1 + more)):
                proofs.append(rho * (1 + more))
                break
    return min(proofs, default=None)


def _multipliers(problem: Inequality, solver: str) -> tuple[Tensor, str]:
    """What a solver of cvxpy's finds, clipped at 0."""
    import cvxpy as cp
    import scipy.sparse

    N, C = problem.size, problem.multipliers
    at, cells, numbers = _entries(problem)
    constraint = scipy.sparse.csr_array((numbers, (at, cells)), shape=(N * N, C + 1))
    constant = -(problem.O.T @ problem.O).numpy().flatten()
    x: Any = cp.Variable(C + 1)
    whole: Any = cp.reshape(constraint @ x + constant, (N, N), order="C")
    task: Any = cp.Problem(cp.Minimize(x[C]), [whole >> 0, x >= 0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of inaccurate solutions: what they prove is computed below
            task.solve(solver=solver, **_OPTIONS.get(solver, {}))
    except cp.SolverError as error:
        raise OptxError(f"lipschitz: {solver} failed: {error}") from error
    if task.status not in ("optimal", "optimal_inaccurate"):
        raise OptxError(
            f"lipschitz: {solver} ended with {task.status!r} and no bound. Try another solver, split=2, or "
            "method='product'."
        )
    return torch.from_numpy(np.asarray(x.value)[:C]).clamp_min(0), str(task.status)


def _entries(problem: Inequality) -> tuple[Any, Any, Any]:
    """Entries of K(t) + rho E_0^T E_0 by multiplier (rho is the last): places in it, multipliers, numbers."""
    P, d, N = problem.P, problem.inputs, problem.size
    at, cells, numbers = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(rows: Tensor, columns: Tensor, cell: Tensor, number: Tensor) -> None:
        at.append(rows * N + columns)
        cells.append(cell)
        numbers.append(number)

    for block in problem.blocks.unique():
        row = (problem.blocks == block).nonzero().flatten()
        columns = (P[row] != 0).any(0).nonzero().flatten()
        p, cell, own = P[row][:, columns], problem.cells[row], d + row
        both = (problem.low * problem.high)[row]
        if bool((both != 0).any()):
            outer = 2 * both[:, None, None] * p[:, :, None] * p[:, None]
            i, j = columns[:, None].expand(outer.shape[1:]), columns.expand(outer.shape[1:])
            add(*(x.expand(outer.shape).flatten() for x in (i, j, cell[:, None, None], outer)))
        cross = -(problem.low + problem.high)[row, None] * p
        if bool((cross != 0).any()):
            here, there = own[:, None].expand(p.shape).flatten(), columns.expand(p.shape).flatten()
            each = cell[:, None].expand(p.shape).flatten()
            add(here, there, each, cross.flatten())
            add(there, here, each, cross.flatten())
        add(own, own, cell, torch.full((len(row),), 2.0, dtype=P.dtype))
    first = torch.arange(d)
    add(first, first, torch.full((d,), problem.multipliers), torch.ones(d, dtype=P.dtype))
    joined = [torch.cat(each) for each in (at, cells, numbers)]
    there = joined[2] != 0
    return tuple(each[there].numpy() for each in joined)  # pyright: ignore[reportReturnType]
