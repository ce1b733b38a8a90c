"""The skip recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report, _skip_filters
from ._report import Table
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Of filters, and what time it takes to skip them."""
    return _skip_filters.tables(results)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(1)
    left = axes[0][0]
    _skip_filters.draw(left, run.results, _report.COLOURS)
    _report.label(left, "Digits: filters at random as x", "multiply-adds, share of dense", "test accuracy")
    left.legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "skip.png")
