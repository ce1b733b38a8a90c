"""The think recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report, _think_bandit, _think_diversity, _think_sums
from ._report import Table, by_seed
from ._run import Run

PARTS: dict[str, Any] = {"diversity": _think_diversity, "bandit": _think_bandit, "sums": _think_sums}
"""Each has ``ARMS``, ``OPTIONS``, ``prepared(args)``, ``train``, ``tables(results)`` and ``draw``, a
``TITLE`` and ``AXES`` for its picture, and ``ONCE`` where one seed has samples enough."""


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    run = set(by_seed(results["arms"]))
    return [table for part in PARTS.values() if run & set(part.ARMS) for table in part.tables(results)]


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    there = set(by_seed(run.results["arms"]))
    drawn = [part for part in PARTS.values() if there & set(part.ARMS)]
    figure, axes = _report.canvas(len(drawn))
    for ax, part in zip(axes[0], drawn, strict=True):
        part.draw(ax, run.results)
        _report.label(ax, part.TITLE, *part.AXES)
    _report.save(figure, run.folder / "think.png")
