"""The think recipe's parts, and their tables and picture."""

from __future__ import annotations

from typing import Any

from . import _in_parts, _think_bandit, _think_diversity, _think_sums
from ._report import Table
from ._run import Run

PARTS: dict[str, Any] = {"diversity": _think_diversity, "bandit": _think_bandit, "sums": _think_sums}


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    return _in_parts.tables(PARTS, results)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _in_parts.report(PARTS, run, "think.png")
