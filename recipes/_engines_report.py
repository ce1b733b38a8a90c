"""What the results page says of engines and methods, from what ``tests/engines/record.py`` writes."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from ._report import Table

_TITLES = {"transform": "Around an optimizer (optx.wrap)", "injection": "In a model (optx.attach)"}
_TITLES["loss"] = "Losses"


NOT_YET = "not recorded yet"


def options() -> ArgumentParser:
    """The recorder's command line."""
    return ArgumentParser(prog="python tests/engines/record.py")


def tables(results: dict[str, Any]) -> list[Table]:
    """One for each kind of method: what each engine makes of it."""
    return [_table(kind, results) for kind in _TITLES]


def _table(kind: str, results: dict[str, Any]) -> Table:
    names = [name for name, one in results["kinds"].items() if one == kind]
    columns: dict[str, dict[str, Any]] = {
        column: {name: cells.get(name, {}) for name in names} for column, cells in results["cells"].items()
    }
    every = [cell for cells in columns.values() for cell in cells.values()]
    notes = {words: number for number, words in enumerate(dict.fromkeys(filter(None, map(_why, every))), 1)}
    rows = [[name, *(_shown(cells[name], notes) for cells in columns.values())] for name in names]
    told = " ".join(f"[{number}] {words}" for words, number in notes.items())
    if any(cell.get("untried") == NOT_YET for cell in every):
        told = f"A dash is {NOT_YET}. {told}"
    return Table(["", *columns], rows, _TITLES[kind], f"{_resumed(columns)} {told}".strip())


def _shown(cell: dict[str, Any], notes: dict[str, int]) -> str:
    if cell.get("untried") == NOT_YET:
        return "-"
    if "off" in cell:
        return f"{cell['off']:.0e}" if cell["off"] else "0"
    word = "refused" if "refused" in cell else "untried"
    return f"{word} [{notes[_why(cell)]}]" if _why(cell) else word


def _why(cell: dict[str, Any]) -> str:
    """The reason, which many cells share but for the names in it."""
    said = cell.get("refused", "")
    without_name = said.partition(": ")[2] or said
    if cell.get("untried") == NOT_YET:
        return ""
    words = re.sub(r"(?:parameter )?'\w+(?:\.\w+)+'", "a parameter", without_name) or cell.get("untried", "")
    words = re.sub(r"; it has shape \([\d, ]*\) here", "", words)
    return words if words.endswith((".", ")")) or not words else f"{words}."


def _resumed(columns: dict[str, dict[str, Any]]) -> str:
    """In words, of the engines that were also resumed on as many processes."""
    found: dict[str, Sequence[float]] = {
        column: [cell["resumed"] for cell in cells.values() if "resumed" in cell and "off" in cell]
        for column, cells in columns.items()
    }
    exact = [f"{column} ({len(gaps)})" for column, gaps in found.items() if gaps and not any(gaps)]
    return f"Resumed runs ended with the same bits under {' and '.join(exact)}." if exact else ""
