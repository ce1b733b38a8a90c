"""The explain recipe's parts, and their tables and picture."""

from __future__ import annotations

from typing import Any

from . import _explain_addition, _explain_digits, _explain_halves, _explain_svm, _in_parts
from ._report import Table
from ._run import Run

PARTS: dict[str, Any] = {
    "digits": _explain_digits,
    "addition": _explain_addition,
    "halves": _explain_halves,
    "svm": _explain_svm,
}


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    return _in_parts.tables(PARTS, results)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _in_parts.report(PARTS, run, "explain.png")
