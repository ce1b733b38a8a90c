"""Whether a model learns features or only a function, as it is made wider.

Source: Yang, Hu, "Feature Learning in Infinite-Width Neural Networks" (Tensor Programs IV), arXiv 2011.14522,
definition 3.5 and theorem 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer

from optx._errors import OptxError, near
from optx.scaling._coordinate_check import coordinate_check
from optx.scaling._coordinate_result import LayerSizes
from optx.scaling._coordinate_runs import Maker

Array = npt.NDArray[Any]  # float64


@dataclass(frozen=True)
class FeatureChange:
    """What `optx.scaling.feature_change` found.

    Attributes:
        widths: in order.
        changes: by hidden module, for each width: rms of what training changed of its output, over the rms
            that the output had at first; means of logarithms over the seeds.
        slopes: by hidden module, of log change on log width; -1/2 in the NTK parametrization, 0 in muP.
        tolerance: the slope from which on features are said to freeze, or to blow up.
    """

    widths: tuple[float, ...]
    changes: Mapping[str, tuple[float, ...]]
    slopes: Mapping[str, float]
    tolerance: float

    def regime_of(self, module: str) -> str:
        """``"features"``, ``"kernel"`` (they change the less the wider it is) or ``"unstable"``."""
        if module not in self.slopes:
            raise OptxError(
                f"FeatureChange: no hidden module is called {module!r}. {near(module, self.slopes)}"
            )
        slope = self.slopes[module]
        return "unstable" if slope > self.tolerance else "kernel" if slope < -self.tolerance else "features"

    @property
    def regime(self) -> str:
        """Of the model: unstable if one module is, of the kernel regime if all are."""
        found = {self.regime_of(module) for module in self.slopes}
        return next(name for name in ("unstable", "features", "kernel") if name in found)

    def __str__(self) -> str:
        """A line for each hidden module: its changes by width, the slope and what that means."""
        rows = [["module", *(f"{width:g}" for width in self.widths), "slope", ""]]
        for name, changes in self.changes.items():
            numbers = (*(f"{x:.3g}" for x in changes), f"{self.slopes[name]:.2f}")
            rows.append([name or "(the model)", *numbers, self.regime_of(name)])
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, sizes)).rstrip() for row in rows)
        return "\n".join(lines)


def feature_change(
    make: Maker,
    widths: Sequence[float],
    batches: Any,
    *,
    optimizer: str | Callable[[nn.Module], Optimizer] | None = None,
    lr: float = 1e-3,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 1,
    seeds: int = 4,
    tolerance: float = 0.25,
) -> FeatureChange:
    """How much training changes a model's hidden features, relative to their size, against its width.

    In the kernel regime they change by 1/sqrt(width), and a wide model only learns a function on top of what
    it began with; where features are learnt the relative change doesn't depend on width. The models are
    trained as in `optx.scaling.coordinate_check`, whose arguments these are. Hidden features are the outputs
    of modules with weights, and with more numbers the wider the model is.

    Args:
        make: ``make(width)`` gives a new model, or a new (model, optimizer).
        widths: two or more; a factor of 8 between the ends says more.
        batches: one, or a list of them; features are read on the first.
        optimizer: where ``make`` gives a model alone: ``"adamw"``, ``"adam"``, ``"sgd"``, or a function of
            the model.
        lr: learning rate of an optimizer that is given by name.
        loss_fn: ``loss_fn(output, batch)`` gives a scalar; None: the output's own or that of a pair.
        steps: of training before the features are read again.
        seeds: runs at each width.
        tolerance: a slope below minus this is a kernel's, above it features blow up; half of the half that
            the two regimes are apart.

    Returns:
        A `FeatureChange`: ``changes``, ``slopes``, ``regime``; ``print`` shows a table.

    Paper values:
        There is nothing to set: a slope of -1/2 in the NTK parametrization, 0 for the maximal update.

    Limits: An estimate at finite widths, from samples of large outputs. A change below float32's rounding
        (a learning rate too small) has the slope of rounding: look at ``changes``.

    Keywords: feature learning, kernel regime, lazy training, NTK, neural tangent kernel, muP, diagnostics.

    Evidence: ``test_feature_change.py``; no recipe.

    Source: "Feature Learning in Infinite-Width Neural Networks", Tensor Programs IV, arXiv 2011.14522.

    Raises:
        OptxError: as in `optx.scaling.coordinate_check`; or no hidden module is found, or one doesn't change
            at all or is not finite at some width.

    Example:
        >>> import torch, optx
        >>> from torch import nn
        >>> def make(width):
        ...     return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))
        >>> batch = (torch.randn(16, 6), torch.randn(16, 1))
        >>> found = optx.scaling.feature_change(make, [64, 256, 1024], batch, optimizer="sgd", lr=1e-3)
        >>> found.regime  # torch's initialisation, one learning rate
        'kernel'
    """
    check = coordinate_check(
        make,
        widths,
        batches,
        optimizer=optimizer,
        lr=lr,
        loss_fn=loss_fn,
        steps=steps,
        seeds=seeds,
        norm="l2",
        tolerance=tolerance,
    )
    hidden = {name: one for name, one in check.layers.items() if one.has_weights and not one.finite_output}
    if not hidden:
        raise OptxError(
            "feature_change: no module with weights has an output that grows with width, so there are no "
            "hidden features to compare."
        )
    logs = {name: _log_change(name, one, check.widths) for name, one in hidden.items()}
    at = np.log(np.asarray(check.widths, dtype=np.float64))
    return FeatureChange(
        tuple(check.widths),
        {name: tuple(np.exp(row).tolist()) for name, row in logs.items()},
        {name: float(np.polyfit(at, row, 1)[0]) for name, row in logs.items()},
        tolerance,
    )


def _log_change(name: str, layer: LayerSizes, widths: Sequence[float]) -> Array:
    """By width, the mean over the seeds of log(change over first size)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.log(layer.change[:, :, -1] / layer.output[:, :, 0]).mean(0)
    if not np.isfinite(found).all():
        raise OptxError(
            f"feature_change: the features of {name!r} don't change or are not finite at width "
            f"{widths[int(np.argmin(np.isfinite(found)))]:g}; they must be trained there, with a finite loss."
        )
    return found
