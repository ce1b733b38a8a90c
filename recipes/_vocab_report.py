"""The vocab recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report, _vocab_head, _vocab_words
from ._report import Table, by_seed
from ._run import Run

PARTS: dict[str, Any] = {"head": _vocab_head, "words": _vocab_words}
"""Each has ``ARMS``, ``OPTIONS``, ``prepared(args)``, ``train``, ``tables(results)`` and ``draw``, and a
``TITLE`` and ``AXIS`` for its picture."""


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    run = set(by_seed(results["arms"]))
    return [table for part in PARTS.values() if run & set(part.ARMS) for table in part.tables(results)]


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(len(PARTS))
    there = set(by_seed(run.results["arms"]))
    for ax, part in zip(axes[0], PARTS.values(), strict=True):
        if there & set(part.ARMS):
            part.draw(ax, run.results)
        _report.label(ax, part.TITLE, *part.AXES)
    _report.save(figure, run.folder / "vocab.png")
