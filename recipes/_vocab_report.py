"""The vocab recipe's parts, and their tables and picture."""

from __future__ import annotations

from typing import Any

from . import _in_parts, _vocab_head, _vocab_words
from ._report import Table
from ._run import Run

PARTS: dict[str, Any] = {"head": _vocab_head, "words": _vocab_words}


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    return _in_parts.tables(PARTS, results)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _in_parts.report(PARTS, run, "vocab.png")
