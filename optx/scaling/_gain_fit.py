"""The law of top singular values: constant * (lr / weight_decay)^a * width^p, fitted over runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from optx._errors import OptxError
from optx.scaling._sublayer_gain import SublayerGains


@dataclass(frozen=True)
class GainRun:
    """A trained model, for `fit_gains`.

    Attributes:
        width: its width.
        lr: the learning rate of its matrices (after muP's division, if any).
        weight_decay: of its matrices, decoupled as AdamW's: lr * weight_decay of a weight is lost in a step.
        gains: its `SublayerGains`, or top singular values by name (``value`` of an
            `optx.scaling.GainRecord`).
    """

    width: float
    lr: float
    weight_decay: float
    gains: SublayerGains | Mapping[str, float]


@dataclass(frozen=True)
class GainFit:
    """``top = constant * (lr / weight_decay)^ratio_exponent * width^exponent``, a constant for each matrix.

    Attributes:
        exponent: of the width; arXiv 2510.15262 finds 0.75. A least-squares estimate.
        exponent_error: its standard error; nan if there are no more values than unknowns.
        ratio_exponent: of lr / weight_decay: 0.5, or an estimate where it was fitted.
        ratio_error: its standard error; 0 where it was not fitted.
        constants: by matrix.
        residual: root of the mean square of log(measured / fitted).
        residuals: by matrix, log(measured / fitted), run by run.
    """

    exponent: float
    exponent_error: float
    ratio_exponent: float
    ratio_error: float
    constants: Mapping[str, float]
    residual: float
    residuals: Mapping[str, tuple[float, ...]] = field(repr=False)

    def predict(self, name: str, width: float, lr: float, weight_decay: float) -> float:
        """The law's top singular value of a matrix."""
        if name not in self.constants:
            raise OptxError(
                f"GainFit.predict: {name!r} was not in the fit ({len(self.constants)} matrices were)."
            )
        for what, value in (("width", width), ("lr", lr), ("weight_decay", weight_decay)):
            if not _is_positive(value):
                raise OptxError(f"GainFit.predict: {what} is {value!r}; it must be a number above 0.")
        return self.constants[name] * (lr / weight_decay) ** self.ratio_exponent * width**self.exponent


def fit_gains(runs: Sequence[GainRun], *, fit_ratio: bool = False) -> GainFit:
    """Fit how top singular values go with width, learning rate and weight decay, over trained runs.

    arXiv 2510.15262 says sqrt(lr / weight_decay) * width^0.75 in AdamW's steady state, which takes some
    3 / (lr * weight_decay) steps to be reached.

    Args:
        runs: of two widths at least, with the same matrices.
        fit_ratio: fit the exponent of lr / weight_decay too; else it is 0.5. Runs of one width must then
            differ in it.

    Returns:
        A `GainFit`, by least squares of logarithms.

    Raises:
        OptxError: all runs have one width, they differ in matrices, a value or option is not positive, or
            the runs can't tell the two exponents apart.

    Example:
        >>> import optx
        >>> runs = [optx.scaling.GainRun(d, 1e-3, 0.1, {"w": 0.3 * 0.1 * d**0.75}) for d in (64, 128, 256)]
        >>> fit = optx.scaling.fit_gains(runs)
        >>> round(fit.exponent, 3), round(fit.constants["w"], 3)
        (0.75, 0.3)
    """
    names, logs = _logs(runs)
    width = np.log([run.width for run in runs])
    ratio = np.log([run.lr / run.weight_decay for run in runs])
    unknown = [width, ratio] if fit_ratio else [width]
    # A constant for each matrix is the same as taking each matrix's mean over the runs away.
    x = np.stack([each - each.mean() for each in unknown], 1)
    if np.linalg.matrix_rank(x, tol=1e-9 * np.linalg.norm(x)) < len(unknown):
        wanted = (
            "two widths, and differ in lr / weight_decay otherwise than with the width"
            if fit_ratio
            else "two widths"
        )
        raise OptxError(f"fit_gains: the runs can't tell: they must be of at least {wanted}.")
    fixed = np.zeros(len(runs)) if fit_ratio else 0.5 * ratio
    y = logs - fixed
    centred = y - y.mean(1, keepdims=True)
    found = np.linalg.lstsq(x, centred.mean(0), rcond=None)[0]
    off = centred - x @ found
    errors = _standard_errors(x, off, len(names))
    constants = y.mean(1) - np.stack([each.mean() for each in unknown]) @ found
    return GainFit(
        float(found[0]),
        errors[0],
        float(found[1]) if fit_ratio else 0.5,
        errors[1] if fit_ratio else 0.0,
        {name: math.exp(c) for name, c in zip(names, constants, strict=True)},
        float(np.sqrt(np.mean(off**2))),
        {name: tuple(map(float, row)) for name, row in zip(names, off, strict=True)},
    )


def _standard_errors(x: np.ndarray, off: np.ndarray, matrices: int) -> list[float]:
    """Of the common exponents, each matrix's values being taken as independent."""
    free = off.size - matrices - x.shape[1]
    if free <= 0:
        return [math.nan] * x.shape[1]
    variance = float(np.sum(off**2)) / free
    return [float(v) for v in np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * variance / matrices)]


def _logs(runs: Sequence[GainRun]) -> tuple[list[str], np.ndarray]:
    """Names, and log top values as (matrices, runs)."""
    if not runs:
        raise OptxError("fit_gains: runs is empty.")
    values = [_values(i, run) for i, run in enumerate(runs)]
    names = list(values[0])
    if not names:
        raise OptxError("fit_gains: runs[0].gains is empty; give a SublayerGains, or values by name.")
    for i, (run, each) in enumerate(zip(runs, values, strict=True)):
        if only := sorted(each.keys() ^ values[0].keys()):
            raise OptxError(
                f"fit_gains: {only[0]!r} is in one of runs[0] and runs[{i}] only; compare like with like."
            )
        for what in ("width", "lr", "weight_decay"):
            if not _is_positive(getattr(run, what)):
                raise OptxError(
                    f"fit_gains: runs[{i}].{what} is {getattr(run, what)!r}; it must be positive."
                )
        if bad := [name for name, value in each.items() if not _is_positive(value)]:
            raise OptxError(
                f"fit_gains: runs[{i}] has {each[bad[0]]!r} for {bad[0]!r}; its logarithm is wanted."
            )
    return names, np.log([[each[name] for each in values] for name in names])


def _values(at: int, run: Any) -> dict[str, float]:
    if not isinstance(run, GainRun):
        raise OptxError(f"fit_gains: runs[{at}] is a {type(run).__name__}; it must be a GainRun.")
    if isinstance(run.gains, SublayerGains):
        return {name: one.value for name, one in run.gains.top.items()}
    if not isinstance(run.gains, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"fit_gains: runs[{at}].gains is a {type(run.gains).__name__}; give a SublayerGains, or values "
            "by name."
        )
    return dict(run.gains)


def _is_positive(value: Any) -> bool:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < math.inf
