"""Counterfactuals that outlive the model: T-Rex:I and T-Rex:NN.

Source: Hamman, Noorani, Mishra, Magazzeni, Dutta, "Robust Counterfactual Explanations for Neural Networks
With Probabilistic Guarantees", ICML 2023, arXiv 2305.11997.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice, check_range, check_whole
from optx.analysis.counterfactual._box import Box, box_of
from optx.analysis.counterfactual._classifier import Classifier, Output
from optx.analysis.counterfactual._examples import closest_points, first_stable, nearest_points, of_class
from optx.analysis.counterfactual._noise import drawn, generator_of
from optx.analysis.counterfactual._rows import Norm, check_like, length, rows_of
from optx.analysis.counterfactual._walk import Walk

_WHO = "robust_counterfactual"


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What `robust_counterfactual` found, row by row.

    Attributes:
        x: the counterfactuals, like the factuals.
        stability: of them, (N,): the relaxed measure, with noise that no step was taken by.
        reached: (N,) bool: they are of the target class, and their Stability is tau or more.
        steps: (N,) int64: steps taken from the base; of ``"nn"``, how many examples were passed by.
        distance: from the factuals, (N,) float64, in the norm that was asked for.
        valid: (N,) bool: of the target class by this model.
    """

    x: Tensor
    stability: Tensor
    reached: Tensor
    steps: Tensor
    distance: Tensor
    valid: Tensor

    def __repr__(self) -> str:
        n = len(self.x)
        return (
            f"Counterfactuals({n} rows: {int(self.valid.sum())} of the class, "
            f"{int(self.reached.sum())} reached; "
            f"stability {self.stability.min():.3g} to {self.stability.max():.3g}, "
            f"distance {self.distance.min():.3g} to {self.distance.max():.3g})"
        )


def robust_counterfactual(
    model: Any,
    x: Any,
    target: Any = 1,
    *,
    base: Literal["closest", "nn"] | Tensor = "closest",
    method: Literal["iterative", "nn"] = "iterative",
    tau: float = 0.75,
    data: Any = None,
    norm: Norm = "l2",
    bounds: tuple[Any, Any] | None = None,
    immutable: Sequence[int] | Tensor | None = None,
    eps_max: float = 1.0,
    max_steps: int = 100,
    eta: float = 0.01,
    neighbours: int = 50,
    k: int = 1000,
    sigma: float = 0.1,
    generator: torch.Generator | int = 0,
    output: Output = "auto",
    chunk: int = 8192,
) -> Counterfactuals:
    """Points of another class that keep it when the model is trained again: moved until Stability is tau.

    ``"iterative"`` (T-Rex:I) goes from a base up the gradient of `optx.analysis.stability`, in steps of
    length eta, within the box and an l2 ball about the base, each row until it has tau. ``"nn"`` (T-Rex:NN)
    takes the nearest example of the class that has tau: a row of ``data`` as it is, and farther away.

    Steps have fresh noise. What is returned was measured with other noise, the generator's first: that of
    ``stability(model, found.x, ...)`` with the same seed, k and sigma. A row of which no point has tau is the
    best one met, with ``reached`` False; the measure is never above the class's probability, nor then tau.

    Args:
        model: as of `optx.analysis.stability`. For steps its output needs a gradient; an estimator has
            ``max_steps=0`` (bases as they are, the closest found along segments to examples) and
            ``method="nn"``.
        x: factuals, (N, features...).
        target: the class that they shall come to.
        base: where steps begin. ``"closest"``: the closest point of the class that is found, from the nearest
            examples and along the boundary; ``"nn"``: the nearest example; or points like x.
        method: ``"iterative"`` or ``"nn"``.
        tau: the Stability that is wanted.
        data: examples of all classes, (M, features...); those that the model gives the target are used.
        norm: ``"l2"`` or ``"l1"``: of distances, and of what is closest and nearest.
        bounds: least and greatest value of features, two numbers or tensors like one row. None: those of data
            and of the factual; without data there are none.
        immutable: numbers of features that may not change (of rows with axes, those of the flattened row), or
            a bool mask like one row.
        eps_max: how far steps may lead from the base, in l2.
        max_steps: how many; 0: the base itself is measured.
        eta: the length of one.
        neighbours: of ``"nn"``: how many examples a row may look at.
        k: samples of a measurement.
        sigma: their deviation.
        generator: of all noise, or a seed for a new one.
        output: what the model gives, as of `optx.analysis.stability`.
        chunk: rows that the model is called with at a time, at most.

    Returns:
        The points, and what they are.

    Paper values:
        ``tau=0.75, k=1000, eta=0.01, eps_max=1.0``: the code, of features scaled to [0, 1] (the defaults).
        ``max_steps=20, sigma=0.05``: the code's command line, a way of 0.2 at most.

    Limits: Steps up the probability itself (``sigma=1e-5, k=1``) led as far to points that lasted as well
        (the recipe). The closest is a local optimum of several starts, and no certificate. Immutable features
        have no part in ``method="nn"``. Categories coded as several features do not stay one by themselves.

    Keywords: counterfactual explanation, recourse, algorithmic recourse, robustness, T-Rex, explainability,
        XAI, decision boundary, plausibility.

    Evidence: ``optx run counterfactuals``; ``test_robust_counterfactual.py``, ``test_closest.py``.

    Source: arXiv 2305.11997, algorithms 1 and 2.

    Raises:
        OptxError: an argument out of range or out of the box, no example of the class where one is needed, a
            model without gradients where they are, or what `optx.analysis.stability` refuses.
        ShapeError: rows that are not like those of x.

    Example:
        >>> import torch, optx
        >>> data = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> model = lambda x: (20 * (x.sum(1) - 1)).sigmoid()
        >>> found = optx.analysis.robust_counterfactual(
        ...     model, torch.tensor([[0.2, 0.3]]), data=data, output="probabilities", sigma=0.02)
        >>> (10 * found.x).round().tolist(), found.reached.tolist()
        ([[5.0, 6.0]], [True])
    """
    check_choice(_WHO, "method", method, ("iterative", "nn"))
    check_choice(_WHO, "norm", norm, ("l1", "l2"))
    if not isinstance(base, Tensor):
        check_choice(_WHO, "base", base, ("closest", "nn"))
    check_range(_WHO, "tau", tau, -1, 1)
    k, sigma = check_whole(_WHO, "k", k, 1), check_above_0(_WHO, "sigma", sigma)
    max_steps, neighbours = (
        check_whole(_WHO, "max_steps", max_steps, 0),
        check_whole(_WHO, "neighbours", neighbours, 1),
    )
    eps_max, eta = check_above_0(_WHO, "eps_max", eps_max), check_above_0(_WHO, "eta", eta)
    draws = generator_of(_WHO, generator)

    x = rows_of(_WHO, "x", x, model)
    classifier = Classifier(_WHO, model, target, output, chunk, x)
    if data is not None:
        check_like(_WHO, "data", data := rows_of(_WHO, "data", data, x), x)
    if method == "nn":
        _check_nn(base, immutable)
    elif classifier.is_estimator and max_steps:
        raise OptxError(
            f"{_WHO}: {type(model).__name__} has no gradients to take steps by. Pass method='nn', or "
            "max_steps=0 for the base as it is."
        )
    box = box_of(_WHO, x, data, bounds, immutable)
    with classifier.in_use():
        judge = list(drawn(draws, k, sigma, x))
        if method == "nn":
            examples = _examples(classifier, data, "method='nn'")
            found, held, steps = first_stable(classifier, x, examples, box, norm, neighbours, tau, judge)
        else:
            start = _base(classifier, x, base, data, box, norm)
            fresh = (drawn(draws, k, sigma, x) for _ in range(max_steps))
            found, held, steps = Walk(box, tau, eps_max, eta, judge).up(classifier, start, fresh)
        valid = classifier.leads(found) > 0
    return Counterfactuals(found, held, valid & (held >= tau), steps, length(found - x, norm), valid)


def _examples(classifier: Classifier, data: Tensor | None, what: str) -> Tensor:
    if data is None:
        raise OptxError(f"{_WHO}: {what} begins with examples; pass data=, rows of all classes.")
    return of_class(_WHO, classifier, data)


def _base(classifier: Classifier, x: Tensor, base: Any, data: Tensor | None, box: Box, norm: Norm) -> Tensor:
    """Where steps begin, in the box; a factual itself where none of its examples is."""
    if isinstance(base, Tensor):
        check_like(_WHO, "base", base := rows_of(_WHO, "base", base, x), x)
        if len(base) != len(x):
            raise ShapeError(
                f"{_WHO}: base has {len(base)} rows; it must have one of each of the {len(x)} of x."
            )
        if not bool((inside := box.holds(base)).all()):
            raise OptxError(
                f"{_WHO}: row {int((~inside).nonzero()[0])} of base lies outside of bounds, or differs "
                "from x in an immutable feature."
            )
        return base
    examples = _examples(classifier, data, f"base={base!r}")
    if base == "closest":
        return closest_points(classifier, x, examples, box, norm)
    nearest = nearest_points(classifier, x, examples, box, norm)
    return torch.cat([mine if len(mine) else x[i, None] for i, mine in enumerate(nearest)])


def _check_nn(base: Any, immutable: Any) -> None:
    if isinstance(base, Tensor) or base != "closest":
        raise OptxError(f"{_WHO}: base has no use in method='nn', which takes examples; leave it out.")
    if immutable is not None:
        raise OptxError(
            f"{_WHO}: method='nn' returns examples as they are, whatever is immutable; pass "
            "method='iterative' with base='nn', whose examples take the factual's immutable features."
        )
