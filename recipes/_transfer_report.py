"""The transfer recipe's tables and picture, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run
from ._transfer_curves import Found, Optimum, optimum
from ._transfer_sweeps import LEFT_OUT

AXES = {"lr": "learning rate", "decay": "weight decay"}


@dataclass(frozen=True)
class View:
    """What the results say, width by width.

    Attributes:
        found: all runs.
        arms: which.
        widths: from the narrowest on.
        other: by axis, the logarithm of what its sweeps don't sweep.
        tuned: by axis, the logarithm that is best at the narrowest width, on the grid.
    """

    found: Found
    arms: list[str]
    widths: list[int]
    other: dict[str, float]
    tuned: dict[str, float]

    @classmethod
    def of(cls, results: dict[str, Any]) -> View:
        """Of these results."""
        settings = results["settings"]
        arms, widths = list(by_seed(results["arms"])), settings["widths"]
        found, log_decay = Found(results["arms"], widths[0]), math.log2(settings["decay"])
        best_lr = found.best(arms[0], widths[0], "lr", log_decay).grid
        best_decay = found.best(arms[0], widths[0], "decay", best_lr).grid
        other = {"lr": log_decay, "decay": best_lr}
        return cls(found, arms, widths, other, {"lr": best_lr, "decay": best_decay})

    def swept(self, axis: str) -> list[str]:
        """The arms with sweeps of an axis."""
        return [arm for arm in self.arms if (arm, axis) not in LEFT_OUT]

    def best(self, arm: str, width: int, axis: str) -> Optimum:
        """Where a sweep's mean over seeds is least."""
        return self.found.best(arm, width, axis, self.other[axis])

    def by_seed(self, arm: str, width: int, axis: str) -> list[float]:
        """Where each seed's own curve is least."""
        curves = self.found.curves(arm, width, axis, self.other[axis])
        return [optimum(curve).at for curve in curves.values()]

    def cost(self, arm: str, axis: str) -> float:
        """What the widest model loses by the narrowest's best value against its own best run."""
        curve = self.found.mean(arm, self.widths[-1], axis, self.other[axis])
        return curve[self.tuned[axis]] - min(curve.values())

    def grown(self, arm: str, width: int) -> list[float]:
        """By hidden matrix, log2 of its top singular value over the narrowest's, mean over seeds."""
        at = self.tuned["lr"], self.tuned["decay"]
        wide, narrow = (self.found.tops(arm, w, *at) for w in (width, self.widths[0]))
        pairs = [zip(wide[seed], narrow[seed], strict=True) for seed in wide if seed in narrow]
        return [
            statistics.mean(one)
            for one in zip(*([math.log2(a / b) for a, b in p] for p in pairs), strict=True)
        ]


def tables(results: dict[str, Any]) -> list[Table]:
    """Where the optima lie, by axis, and how singular values grow."""
    view, settings = View.of(results), results["settings"]
    title = f"{settings['steps']} steps of {settings['batch']} x {settings['length']} characters"
    seeds = len(view.found.curves(view.arms[0], view.widths[0], "lr", view.other["lr"]))
    wide = len(view.found.curves(view.arms[0], view.widths[-1], "lr", view.other["lr"]))
    notes = {
        "lr": "Logarithms to base 2 of the learning rate (muP: before its factors) with the least held-out "
        "loss: the vertex of the parabola through the least point of the mean over seeds and its neighbours, "
        "an octave away; in brackets, those of single seeds, or the last point of a sweep that is least at "
        "its end; < or > where that is so of the mean. "
        f"{seeds} seeds, at width {view.widths[-1]} {wide}. Drift: the widest's less the narrowest's, in "
        "octaves; span: the highest less the lowest; by grid: the drift of the least points themselves. "
        "Cost: what the narrowest's best point costs the widest model against its own best, in nats a "
        f"character. Hidden matrices decay by {settings['decay']:g}, nothing else does.",
        "decay": "The same of the weight decay, whose points are two octaves apart, at the learning rate "
        f"2^{view.tuned['lr']:.3g}, the narrowest's best point.",
    }
    return [
        *(_optima(view, axis, f"{title}: best {AXES[axis]}", notes[axis]) for axis in AXES),
        _singular(view, f"Top singular values against width {view.widths[0]}'s"),
    ]


def _optima(view: View, axis: str, title: str, note: str) -> Table:
    rows: list[Sequence[str]] = []
    for arm in view.swept(axis):
        best = [view.best(arm, width, axis) for width in view.widths]
        cells = [_cell(view, arm, width, axis) for width in view.widths]
        at = [one.at for one in best]
        rows.append(
            (
                arm,
                *cells,
                f"{at[-1] - at[0]:+.2f}",
                f"{max(at) - min(at):.2f}",
                f"{best[-1].grid - best[0].grid:+.0f}",
                f"{view.cost(arm, axis):.3f}",
            )
        )
    headers = ("", *(f"width {width}" for width in view.widths), "drift", "span", "by grid", "cost")
    return Table(headers, rows, title, note)


def _cell(view: View, arm: str, width: int, axis: str) -> str:
    best, seeds = view.best(arm, width, axis), view.by_seed(arm, width, axis)
    mark = ""
    if not best.inside:
        higher = max(view.found.mean(arm, width, axis, view.other[axis])) > best.grid
        mark = "< " if higher else "> "
    ends = f" ({min(seeds):.2f} to {max(seeds):.2f})" if len(seeds) > 1 else ""
    return f"{mark}{best.at:.2f}{ends}"


def _singular(view: View, title: str) -> Table:
    rows: list[Sequence[str]] = []
    for arm in view.arms:
        grown = {width: view.grown(arm, width) for width in view.widths[1:]}
        cells = [_ratios(one) for one in grown.values()]
        last = grown[view.widths[-1]]
        rows.append((arm, *cells, f"{statistics.mean(map(abs, last)):.2f}" if last else "diverged"))
    headers = ("", *(f"width {width}" for width in view.widths[1:]), "off, octaves")
    count = len(view.grown(view.arms[0], view.widths[0]))
    return Table(
        headers,
        rows,
        title,
        f"After training with the narrowest's best point, learning rate 2^{view.tuned['lr']:.3g} and weight "
        f"decay 2^{view.tuned['decay']:.3g}. Ratios: geometric mean and range over {count} hidden matrices, "
        "each the mean over seeds; 1 is a match. Off: the mean size of their logarithms to base 2 at the "
        "widest.",
    )


def _ratios(logs: Sequence[float]) -> str:
    if not logs:
        return "diverged"
    middle, low, high = (2**x for x in (statistics.mean(logs), min(logs), max(logs)))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    view = View.of(run.results)
    figure, axes = _report.canvas(len(view.arms), 2)
    for row, axis in enumerate(AXES):
        drawn = zip(axes[row], view.swept(axis), strict=False)
        for ax, arm in drawn:
            _draw(ax, view, arm, axis)
        for ax in axes[row][len(view.swept(axis)) :]:
            _draw_grown(ax, view)
    axes[0, 0].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "transfer.png")


def _draw(ax: Any, view: View, arm: str, axis: str) -> None:
    """An arm's curves, width by width, with their optima."""
    lows: list[float] = []
    for colour, width in zip(_report.COLOURS, view.widths, strict=False):
        curve = view.found.mean(arm, width, axis, view.other[axis])
        kept = {at: loss for at, loss in curve.items() if math.isfinite(loss)}
        ax.plot([2**at for at in kept], list(kept.values()), "o-", color=colour, markersize=3, linewidth=1.2)
        best = view.best(arm, width, axis)
        ax.plot(2**best.at, best.loss, "*", color=colour, markersize=12, label=f"width {width}")
        lows.append(best.loss)
    ax.axvline(2 ** view.tuned[axis], color="black", linewidth=0.6, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_ylim(min(lows) - 0.03, max(lows) + 0.2)
    _report.label(ax, arm, AXES[axis], "held-out loss, nats a character")


def _draw_grown(ax: Any, view: View) -> None:
    """How singular values grow with width, arm by arm."""
    for colour, arm in zip(_report.COLOURS, view.arms, strict=False):
        logs = {width: view.grown(arm, width) for width in view.widths}
        there = {width: 2 ** statistics.mean(one) for width, one in logs.items() if one}
        ax.plot(list(there), list(there.values()), "o-", color=colour, markersize=3, linewidth=1.2, label=arm)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.legend(frameon=False, fontsize=8)
    _report.label(ax, "Top singular values, by the narrowest's", "width")
