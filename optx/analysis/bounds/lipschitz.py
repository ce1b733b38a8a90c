"""How much a trained network can change per unit of its input: certified by a semidefinite program.

Sources: Fazlyab, Robey, Hassani, Morari, Pappas, "Efficient and accurate estimation of Lipschitz constants
for deep neural networks", NeurIPS 2019, arXiv 1906.04893 (LipSDP); Pauli, Havens, Araujo, Garg, Khorrami,
Allgöwer, Hu, "Novel quadratic constraints for extending LipSDP beyond slope-restricted activations", ICLR
2024, arXiv 2401.14033 (GroupSort, MaxMin, Householder; residual and implicit networks; l_inf).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_choice, check_whole, shown
from optx.analysis.bounds._inequality import inequality
from optx.analysis.bounds._reading import read
from optx.analysis.bounds._search import steepest
from optx.analysis.bounds._solve import Solved, solve, solver_for
from optx.analysis.bounds._system import System

Slope = tuple[float, float]


@dataclass(frozen=True)
class LipschitzBound:
    """What `lipschitz` found.

    Attributes:
        bound: no pair of inputs is mapped further apart than by this factor; certified.
        certified: whether that is proved; False if it rests on slopes that were declared.
        status: what the solver said (of several programs, the least good), ``"product"`` where none was
        asked.
        solver: whose multipliers prove the bound; ``"product"`` if the product of norms is as small.
        product_bound: the product of the layers' norms; certified as well.
        lower_bound: the largest change that a search found; heuristic: the truth may be above. nan without
        one.
        norm: of inputs and outputs.
        method: how multipliers are shared.
        parts: certified bounds of the parts between cuts, whose product ``bound`` is; one without ``split``.
    """

    bound: float
    certified: bool
    status: str
    solver: str
    product_bound: float
    lower_bound: float
    norm: str
    method: str
    parts: tuple[float, ...]

    def __repr__(self) -> str:
        proof = "certified" if self.certified else "if the declared slopes are right"
        return (
            f"LipschitzBound({self.norm}: bound={self.bound:.6g} ({proof}; {self.method}, {self.solver}, "
            f"{self.status}), product_bound={self.product_bound:.6g} ({proof}), "
            f"lower_bound={self.lower_bound:.6g} (heuristic))"
        )


def lipschitz(
    model: nn.Module,
    input_shape: int | Sequence[int] | None = None,
    *,
    norm: Literal["l2", "linf"] = "l2",
    method: Literal["neuron", "layer", "product"] = "neuron",
    solver: str | None = None,
    split: int | None = None,
    slopes: Mapping[type[nn.Module], Slope] | None = None,
    data: Tensor | None = None,
    samples: int = 64,
    max_rows: int | None = None,
) -> LipschitzBound:
    """Bound how far apart a network can map two inputs, per unit of their distance; certified.

    A semidefinite program over multipliers of what is known of each activation (LipSDP), far below the
    product of the layers' norms. Whatever the solver returns, multipliers are clipped at 0, the least bound
    that they prove is computed, and its inequality is checked with room for rounding errors: all in float64.

    The model stays as it is. Its layers are read through torch.fx: linear maps (Linear, convolutions,
    BatchNorm in eval mode, average pooling, reshapes), with parametrizations as they compute; elementwise
    activations; `optx.MaxMin`, `optx.GroupSort`, `optx.Householder`; branches that are added or joined
    (residual networks). A module with a method ``lipschitz_form()`` is read as the module that this returns.

    Args:
        model: in the mode in which it is to be bounded.
        input_shape: of one input, without the batch; None: ``in_features`` of a Linear that comes first.
        norm: ``"l2"``: of inputs and outputs; ``"linf"``: largest entries, by one program for each output.
        method: ``"neuron"``: a multiplier for each unit or group; ``"layer"``: for each activation, faster
            and looser; ``"product"``: of norms, without a program.
        solver: ``"CLARABEL"``, ``"SCS"`` or another of cvxpy's, or ``"first-order"``, optx's own, which
            needs no cvxpy; None: Clarabel, where it is installed, up to 100 rows of the inequality, above
            them first-order.
        split: cut a deep network after each so many activations (2 to 4), where a single value goes on, and
            multiply the parts' bounds: faster and looser.
        slopes: of your own elementwise modules, by type: the least and the largest difference quotient.
        data: inputs (n, *input_shape) to begin the search for the lower bound at; None: normal ones.
        samples: how many of them; 0: no search.
        max_rows: the largest inequality that is tried (inputs that are told apart, and hidden units);
            None: 400, by first-order 1500.

    Returns:
        ``bound``, ``certified``, ``status``, ``solver``, ``product_bound``, ``lower_bound`` and more.

    Paper values:
        ``method="neuron"``, ``norm="l2"`` (the defaults).
        ``norm="linf"``.

    Limits: Some ten seconds for 100 inputs and hidden units together, minutes for 500 (on two cores);
        ``method="layer"``, ``split=`` and ``solver="first-order"`` are faster. MaxPool, LayerNorm,
        softmax and attention are refused. The bound is of exact arithmetic; that of a network in float32
        or bf16 adds its rounding. ``"linf"`` costs a program for each output; for margins append a Linear
        of differences of logits.

    Keywords: LipSDP, LipSDP-NSR, Lipschitz constant, certificate, robustness, semidefinite programming, SDP,
    quadratic constraint, diagnostics.

    Evidence: ``optx run certify``; ``test_lipschitz.py``, ``test_lipschitz_forms.py``,
    ``test_lipschitz_certificates.py``.

    Source: arXiv 2401.14033, theorems 1 to 4; arXiv 1906.04893.

    Raises:
        OptxError: what cannot be bounded, by name; too large an inequality; a solver that ended early, with
            its status; or an argument out of range.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> found = optx.analysis.lipschitz(model)
        >>> found.lower_bound <= found.bound <= found.product_bound
        True
    """
    check_choice("lipschitz", "norm", norm, ("l2", "linf"))
    check_choice("lipschitz", "method", method, ("neuron", "layer", "product"))
    split = None if split is None else check_whole("lipschitz", "split", split, 1)
    samples = check_whole("lipschitz", "samples", samples, 0)
    max_rows = None if max_rows is None else check_whole("lipschitz", "max_rows", max_rows, 1)
    declared = _declared(slopes or {})
    shape = _input_shape(model, input_shape)
    _check_data(data, shape)
    found = read(model, shape, norm, split, declared)
    if method == "product":
        parts = [Solved(found.product, "product", "product")]
    else:
        parts = [_part(one, norm, method == "layer", solver, max_rows) for one in found.systems]
    bound = math.prod(one.bound for one in parts) * (1 + 1e-15)
    worst = max(parts, key=lambda one: (one.status not in ("linear", "optimal"), one.solver != "none"))
    status, by = worst.status, worst.solver
    if found.product < bound:
        bound, by = found.product, "product"
    lower = steepest(model, shape, norm, data, samples) if samples else float("nan")
    if lower > bound * (1 + 1e-4):
        raise OptxError(
            f"lipschitz: at an input that was tried the model changes by {lower:.6g} per unit, above the "
            "bound "
            f"{bound:.6g} of what was read: it computes something else. Please report it with the model."
        )
    return LipschitzBound(
        bound,
        not declared,
        status,
        by,
        found.product,
        min(lower, bound),
        norm,
        method,
        tuple(one.bound for one in parts),
    )


def _part(system: System, norm: str, layers: bool, solver: str | None, max_rows: int | None) -> Solved:
    """The bound of one system: of l_inf the largest of its outputs."""
    systems = [system] if norm == "l2" else [system.row(number) for number in range(system.outputs)]
    solved = list[Solved]()
    for one in systems:
        problem = inequality(one, layers=layers)
        solved.append(solve(problem, solver_for(problem.size, solver, max_rows)))
    return max(solved, key=lambda one: one.bound)


def _declared(slopes: Mapping[type[nn.Module], Slope]) -> dict[type[nn.Module], Slope]:
    for kind, pair in slopes.items():
        given: tuple[Any, ...] = tuple(pair)
        numbers = len(given) == 2 and all(isinstance(x, int | float) for x in given)
        if not (numbers and -math.inf < given[0] <= given[1] < math.inf):
            raise OptxError(
                f"lipschitz: slopes has {shown(kind)}: {shown(pair)}; it must be a module's type: (least, "
                "largest)."
            )
    return {kind: (float(low), float(high)) for kind, (low, high) in slopes.items()}


def _input_shape(model: nn.Module, given: int | Sequence[int] | None) -> tuple[int, ...]:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"lipschitz: model is a {type(model).__name__}; it must be a torch.nn.Module.")
    if any(p.is_meta for p in model.parameters()):
        raise OptxError("lipschitz: the model is on the meta device and has no numbers.")
    if given is None:
        first = model
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        if not isinstance(first, nn.Linear):
            raise OptxError(
                f"lipschitz: input_shape is needed, as the model does not begin with a Linear but with "
                f"{type(first).__name__}: the shape of one input, without the batch, as (784,) or "
                "(1, 28, 28)."
            )
        return (first.in_features,)
    sizes = [given] if isinstance(given, int) else list(given)
    return tuple(
        check_whole("lipschitz", "input_shape", size, 1, "whole numbers from 1 on") for size in sizes
    )


def _check_data(data: Tensor | None, shape: tuple[int, ...]) -> None:
    if data is None:
        return
    if data.ndim < 1 or not len(data) or tuple(data.shape[1:]) != shape:
        raise OptxError(
            f"lipschitz: data has shape {tuple(data.shape)}; it must be (n, {', '.join(map(str, shape))})."
        )
    if not data.is_floating_point() or not bool(torch.isfinite(data).all()):
        raise OptxError("lipschitz: data must be finite floating-point numbers.")
