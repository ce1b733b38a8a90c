"""The share recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Accuracy by compression, over the array's first sizes, and how far apart those are."""
    settings, arms = results["settings"], by_seed(results["arms"])
    compressions = list(dict.fromkeys(c for found in arms.values() for one in found for c in one["accuracy"]))
    rows = [
        (arm, *(_cell(found, c) for c in compressions), *(_apart(found, c) for c in compressions))
        for arm, found in arms.items()
    ]
    heads = (
        *(f"c = {float(c):g}" for c in compressions),
        *(f"spread, c = {float(c):g}" for c in compressions),
    )
    return [
        Table(
            ("test accuracy, %", *heads),
            rows,
            f"{settings['steps']} steps of 64 of {settings['size']} digits",
            "c: numbers per weight of the two hidden matrices. Accuracy: the mean over seeds and, where "
            "there is an array, over its first half-widths 0.001 to 1; in brackets the least and the most. "
            "Spread: between the best and the worst of those half-widths, in points, the mean over seeds.",
        )
    ]


def _cell(found: list[dict[str, Any]], c: str) -> str:
    values = [value for one in found for value in one["accuracy"].get(c, {}).values()]
    return ranged(values, "{:.1f}") if values else "-"


def _apart(found: list[dict[str, Any]], c: str) -> str:
    every = [list(one["accuracy"].get(c, {}).values()) for one in found]
    if min(map(len, every)) < 2:
        return "-"
    return f"{sum(max(values) - min(values) for values in every) / len(every):.1f}"


def report(run: Run) -> None:
    """Print the table and draw accuracy over the array's first size."""
    _report.tell(tables(run.results))
    arms = by_seed(run.results["arms"])
    compressions = ("1.0", "0.1", "0.02")
    figure, axes = _report.canvas(3)
    for ax, c in zip(axes.flat, compressions, strict=True):
        for colour, (arm, found) in zip(_report.COLOURS, arms.items(), strict=False):
            every = [one["accuracy"][c] for one in found if c in one["accuracy"]]
            if not every:
                continue
            sizes = list(every[0])
            means = [sum(one[size] for one in every) / len(every) for size in sizes]
            if len(sizes) > 1:
                ax.plot([float(size) for size in sizes], means, "o-", color=colour, label=arm, linewidth=1.1)
            else:
                ax.axhline(means[0], color=colour, label=arm, linewidth=1.0, linestyle=":")
        ax.set_xscale("log")
        _report.label(
            ax, f"{float(c):g} numbers per weight", "half-width of the array at first", "accuracy, %"
        )
    axes.flat[1].legend(frameon=False, fontsize=7)
    _report.save(figure, run.folder / "share.png")
