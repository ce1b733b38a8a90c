"""The certify recipe's parts, and their tables and picture."""

from __future__ import annotations

from typing import Any

from . import _certify_depth, _certify_digits, _in_parts
from ._report import Table
from ._run import Run

PARTS: dict[str, Any] = {"digits": _certify_digits, "depth": _certify_depth}


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    return _in_parts.tables(PARTS, results)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _in_parts.report(PARTS, run, "certify.png")
