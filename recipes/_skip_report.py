"""The skip recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report, _skip_filters, _skip_windows
from ._report import Table, by_seed
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Of filters and of windows, whichever were run."""
    halves = (_skip_filters, _skip_windows)
    return [
        one
        for half in halves
        if set(half.ARMS) & set(by_seed(results["arms"]))
        for one in half.tables(results)
    ]


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(2)
    left, right = axes[0]
    _skip_filters.draw(left, run.results)
    _report.label(
        left, "Digits (hollow: as many filters at random)", "multiply-adds, share of dense", "test accuracy"
    )
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8)
    _report.label(right, "Blurred (kept windows framed), deblurred, sharp")
    _skip_windows.draw(right, run.results)
    _report.save(figure, run.folder / "skip.png")
