"""Slopes of log size on log width, and whose fault it is when they are not flat.

A layer is judged by what it does itself: at first by its output against its input, and after steps by what
its own change of weights does to its output. Both are looked at as they are and relative to the layer's
input, and only where both grow (or both shrink) with width has the layer failed: one that is merely given
inputs of the wrong size passes them on in proportion, and a norm takes their size away; in each case one
of the two is flat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optx._files import written_aside

Sizes = npt.NDArray[np.float64]  # (seeds, widths, steps + 1)


@dataclass(frozen=True)
class LayerSizes:
    """One module, over seeds, widths and steps: what `optx.scaling.coordinate_check` measured.

    Where a module was not called, or gave no floating tensor, all four are nan.

    Attributes:
        output: (seeds, widths, steps + 1) mean size of the output's coordinates: exact.
        input: of the input's; 1 where it takes no floating tensor, as class numbers have no size.
        update: of what the change of its own weights does to its output: exact.
        change: of its output's change since the first pass.
        finite_output: whether the output has as many coordinates at each width.
        has_weights: whether it has weights of its own.
        sampled: whether ``change`` is an estimate, from a sample of coordinates.
    """

    output: Sizes
    input: Sizes
    update: Sizes
    change: Sizes
    finite_output: bool
    has_weights: bool
    sampled: bool


@dataclass(frozen=True)
class CoordinateCheck:
    """What `optx.scaling.coordinate_check` found; ``print(check)`` shows it as a table.

    Slopes are of log size (mean over seeds) on log width, by least squares: estimates of what happens as
    the width grows. ``nan`` where there is none: a size is 0 or missing at every width.

    Attributes:
        widths: in order.
        tolerance: the slope from which on a layer fails.
        layers: what was measured, by module, in the order of their calls.
        failures: by module, what is wrong with it: those that fail first, whose fault it is.
        later: those that fail at a later step. It may be the doing of the former: repair those and look
            again.
        unsure: those whose slope is beyond the tolerance, but not by twice its standard error over the seeds:
            no failures, and no proof that they are right. More seeds tell.
        slopes: by module, of the output's size, for each step from 0 (as made) on.
        updates: of what a module's own change of weights does to its output, from step 1 on.
        gains: of the output's size over the input's.
        changes: of the output's change since step 0, from step 1 on.
        errors: standard errors of ``slopes`` over the seeds; nan for one seed.
    """

    widths: tuple[float, ...]
    tolerance: float
    layers: Mapping[str, LayerSizes] = field(repr=False)
    failures: Mapping[str, str]
    later: Mapping[str, str]
    unsure: Mapping[str, str]
    slopes: Mapping[str, tuple[float, ...]] = field(repr=False)
    updates: Mapping[str, tuple[float, ...]] = field(repr=False)
    gains: Mapping[str, tuple[float, ...]] = field(repr=False)
    changes: Mapping[str, tuple[float, ...]] = field(repr=False)
    errors: Mapping[str, tuple[float, ...]] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether no layer failed."""
        return not self.failures

    def table(self) -> str:
        """A line for each module: slopes of its output and of its own updates, step by step; the verdict."""
        steps = len(next(iter(self.slopes.values())))
        head = [
            "module",
            *(f"output {t}" for t in range(steps)),
            *(f"update {t}" for t in range(1, steps)),
            "",
        ]
        rows = [head]
        for name in self.layers:
            numbers = (*self.slopes[name], *self.updates[name])
            rows.append([name or "(the model)", *map(_number, numbers), self._word(name)])
        columns = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                [
                    row[0].ljust(columns[0]),
                    *(c.rjust(w) for c, w in zip(row[1:-1], columns[1:-1], strict=True)),
                ]
            )
            + f"  {row[-1]}"
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _word(self, name: str) -> str:
        words = (("FAILS", self.failures), ("later", self.later), ("unsure", self.unsure))
        return next((word for word, some in words if name in some), "")

    def __str__(self) -> str:
        widths = ", ".join(f"{w:g}" for w in self.widths)
        said = [f"{name or '(the model)'}: {why}" for name, why in self.failures.items()]
        if self.later:
            said.append(f"Out of scale at a later step: {', '.join(map(repr, self.later))}.")
        if self.unsure:
            said.append(
                f"Beyond the tolerance by chance or not: {', '.join(map(repr, self.unsure))}; try more seeds."
            )
        verdict = "ok" if self.ok else f"{len(self.failures)} of {len(self.layers)} modules fail"
        return "\n".join(
            [
                f"Slopes of log size on log width, widths {widths}: {verdict} (tolerance {self.tolerance:g})",
                self.table(),
                *said,
            ]
        )

    def picture(self, path: str | Path) -> None:
        """Write sizes against width, a panel a step, as PNG: outputs above, own updates below.

        Args:
            path: of the file; it is written aside and renamed. Needs matplotlib.
        """
        from matplotlib.figure import Figure

        steps = len(next(iter(self.slopes.values())))
        figure = Figure(figsize=(3.4 * steps, 6.4), dpi=140, layout="constrained")
        axes = figure.subplots(2, steps, squeeze=False, sharex=True)
        for row, what in enumerate(("output", "update")):
            for t in range(steps):
                ax = axes[row][t]
                for name, layer in self.layers.items():
                    sizes = _mean(getattr(layer, what)[:, :, t])
                    if np.any(sizes > 0) and (what == "output" or layer.has_weights):
                        bad = name in self.failures
                        style = {"color": "C3", "linewidth": 2.2, "label": name} if bad else {}
                        ax.plot(
                            self.widths, np.where(sizes > 0, sizes, np.nan), **({"linewidth": 0.8} | style)
                        )
                ax.set_xscale("log", base=2)
                ax.set_yscale("log", base=10)
                ax.set_title(f"{what}, step {t}", loc="left", fontsize=9)
                ax.tick_params(labelsize=7)
                if ax.get_legend_handles_labels()[0]:
                    ax.legend(fontsize=6)
        axes[1][0].set_xlabel("width", fontsize=8)
        with written_aside(Path(path)) as aside:
            figure.savefig(aside, format="png")


def judged(widths: Sequence[float], tolerance: float, layers: Mapping[str, LayerSizes]) -> CoordinateCheck:
    """Fit the slopes and say whose fault it is."""
    outputs = {name: slopes(widths, layer.output) for name, layer in layers.items()}
    gains = {name: slopes(widths, layer.output / _or_one(layer.input)) for name, layer in layers.items()}
    updates = {name: slopes(widths, layer.update)[1:] for name, layer in layers.items()}
    judge = _Judge(widths, tolerance)
    faults = judge.faults(layers) or judge.unexplained(layers)
    first = min((fault.stage for fault in faults.values()), default=0)
    return CoordinateCheck(
        tuple(widths),
        tolerance,
        layers,
        {name: fault.why for name, fault in faults.items() if fault.stage == first},
        {name: fault.why for name, fault in faults.items() if fault.stage > first},
        {name: why for name, why in judge.unsure.items() if name not in faults},
        outputs,
        updates,
        gains,
        {name: slopes(widths, layer.change)[1:] for name, layer in layers.items()},
        {name: errors(widths, layer.output) for name, layer in layers.items()},
    )


class Fault(NamedTuple):
    """What is wrong with a module.

    Attributes:
        stage: 0: as made, with inputs as they should be; 1: as made, with others (a square makes more of too
            large an input); 1 + k: at its own k-th update. So a layer below a zero-initialised readout, which
            moves from the second step on only, is compared with the readout at the first update of each.
        why: in words.
    """

    stage: int
    why: str


class _Judge:
    """Looks at modules one by one.

    Attributes:
        unsure: by module, a slope beyond the tolerance, but not by twice its standard error over the seeds.
    """

    def __init__(self, widths: Sequence[float], tolerance: float) -> None:
        self.widths, self.tolerance, self.unsure = widths, tolerance, dict[str, str]()

    def faults(self, layers: Mapping[str, LayerSizes]) -> dict[str, Fault]:
        """By module, how it fails first; of modules around one that fails no later, nothing."""
        found = {name: fault for name, layer in layers.items() if (fault := self._fault(name, layer))}
        return {
            name: fault
            for name, fault in found.items()
            if not any(within(other, name) and it.stage <= fault.stage for other, it in found.items())
        }

    def _fault(self, name: str, layer: LayerSizes) -> Fault | None:
        """When a layer fails first by its own doing, and how."""
        given = _or_one(layer.input)
        if why := self._strays(name, layer.output[..., 0], given[..., 0], layer.finite_output):
            inputs = slope(self.widths, _mean(given[..., 0])) * (-1 if why.startswith("shrinks") else 1)
            return Fault(int(inputs > self.tolerance), f"its output as made {why}")
        if not layer.has_weights:
            return None
        updates = 0
        for t in range(1, layer.update.shape[2]):
            updates += bool(updates) or bool(np.nansum(layer.update[..., t]) > 0)
            if why := self._strays(name, layer.update[..., t], given[..., t]):
                steps = f"{t} step{'s' * (t > 1)}"
                return Fault(1 + updates, f"what {steps} did to its weights {why} in its output")
        return None

    def _strays(self, name: str, size: Sizes, given: Sizes, may_shrink: bool = False) -> str | None:
        """What is wrong with sizes (seeds, widths), as they are and over the input's.

        A readout may start as small as it likes.
        """
        bad = [w for w, out, x in zip(self.widths, size.T, given.T, strict=True) if _broke(out, x)]
        if bad:
            return f"is inf or nan at width {bad[0]:g}"
        zero = [w for w, m in zip(self.widths, _mean(size), strict=True) if m == 0]
        if zero and len(zero) < len(self.widths):
            return f"is 0 at width {', '.join(f'{w:g}' for w in zero)} and is not at others"
        both = [(slope(self.widths, _mean(z)), _error(self.widths, z)) for z in (size, size / given)]
        for sign, word in ((1, "grows"), (-1, "shrinks")):
            if min(sign * s for s, _ in both) > self.tolerance and not (may_shrink and sign < 0):
                why = f"{word} as width^{both[0][0]:.2f} (width^{both[1][0]:.2f} of its input's size)"
                if min(sign * s - 2 * e for s, e in both) > self.tolerance:
                    return why
                self.unsure.setdefault(name, why)
        return None

    def unexplained(self, layers: Mapping[str, LayerSizes]) -> dict[str, Fault]:
        """The first whose output grows by no layer's doing: by what is computed between modules."""
        steps = max((layer.output.shape[2] for layer in layers.values()), default=0)
        for t in range(steps):
            for name, layer in layers.items():
                sizes = layer.output[..., t]
                found = slope(self.widths, _mean(sizes))
                if found - 2 * _error(self.widths, sizes) > self.tolerance:
                    why = f"its output grows as width^{found:.2f} at step {t}, by no module's weights"
                    return {name: Fault(t, f"{why}: look at what is computed around it")}
        return {}


def within(inner: str, outer: str) -> bool:
    """Whether one module lies inside another, by their paths."""
    return inner != outer and (not outer or inner.startswith(f"{outer}."))


def _broke(size: Sizes, given: Sizes) -> bool:
    """Whether what came out is not finite though what went in is."""
    return bool(np.any(~np.isfinite(size) & np.isfinite(given)))


def slope(widths: Sequence[float], sizes: Sizes) -> float:
    """Of log size on log width, by least squares; nan unless two sizes at least are positive and finite."""
    use = np.isfinite(sizes) & (sizes > 0)
    if use.sum() < 2:
        return math.nan
    x, y = np.log(np.asarray(widths, dtype=float)[use]), np.log(sizes[use])
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def slopes(widths: Sequence[float], sizes: Sizes) -> tuple[float, ...]:
    """Step by step, of the mean over seeds."""
    return tuple(slope(widths, _mean(sizes[:, :, t])) for t in range(sizes.shape[2]))


def errors(widths: Sequence[float], sizes: Sizes) -> tuple[float, ...]:
    """Step by step, the slope's standard error over the seeds; nan for one seed."""
    if sizes.shape[0] < 2:
        return (math.nan,) * sizes.shape[2]
    return tuple(_error(widths, sizes[..., t]) for t in range(sizes.shape[2]))


def _error(widths: Sequence[float], sizes: Sizes) -> float:
    """Standard error of the slope over the seeds that have one; 0 where it can't be told."""
    each = np.array([slope(widths, one) for one in sizes])
    each = each[np.isfinite(each)]
    return float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0


def _or_one(given: Sizes) -> Sizes:
    """Sizes to divide by: an input of zeros is no measure."""
    return np.where(given == 0, 1.0, given)


def _mean(sizes: Sizes) -> Sizes:
    """Over the seeds in which a module was called and gave finite numbers; nan if there are none."""
    there = np.isfinite(sizes)
    count = there.sum(0)
    return np.where(count > 0, np.where(there, sizes, 0).sum(0) / np.maximum(count, 1), np.nan)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f}"
