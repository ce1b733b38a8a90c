"""Run the table of engines and methods, and write what came out: ``python tests/engines/record.py``.

Cells of the columns that are named, or of all, go into recipes/results/engines.json beside those that are
there, a few rows at a time; ``--missing`` leaves out rows that have them all, as after an interruption.
``python -m optx.recipes._pages write`` puts the table on the page. What the tests run is a part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import table, trainers
from engines.columns import Found, here
from engines.tasks import ROWS
from processes import results

from optx._errors import near
from optx._files import written_aside
from optx.recipes import _pages, _run

FILE = Path(__file__).resolve().parents[2] / "recipes/results/engines.json"
AT_ONCE = 4  # rows, whose results are written together
EVERY = [row.name for row in ROWS]
ALONE = list(trainers.COLUMNS)
SAVES, LOADS = "FSDP2", ("FSDP2, 2 to 4", "FSDP2, 2 to 1")


def recorded() -> dict[str, dict[str, Any]]:
    """What the file has, by column and row."""
    return json.loads(FILE.read_text(encoding="utf-8"))["cells"] if FILE.exists() else {}


def keep(found: Mapping[str, Found]) -> None:
    """Judge what was found, and write it beside what is there."""
    made, before = table.cells(found), recorded()
    for column, cells in made.items():
        for row, cell in cells.items():
            for line in table.complaints(column, row, cell):
                print(line, flush=True)
    told = {
        "settings": {},
        "environment": _run.environment(),
        "kinds": {row.name: row.kind for row in ROWS},
        "cells": {
            column: _rows(column, before.get(column, {}) | made.get(column, {})) for column in table.BY_TITLE
        },
    }
    with written_aside(FILE) as aside:
        aside.write_text(_pages.written(_pages.rounded(told)) + "\n", encoding="utf-8")


def _rows(column: str, cells: Mapping[str, Any]) -> dict[str, Any]:
    """In the table's order, with the reasons of cells that are none."""
    why = {row: table.untried(column, row) for row in EVERY}
    return {
        row: cells.get(row, table.NOT_YET) if reason is None else {"untried": reason}
        for row, reason in why.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Record what is named."""
    known = list(table.BY_TITLE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("columns", nargs="*", metavar="COLUMN", help=f"of: {'; '.join(known)}")
    parser.add_argument("--missing", action="store_true", help="only rows that lack a cell")
    options = parser.parse_args(arguments)
    for name in options.columns:
        if name not in known:
            parser.error(f"there is no column {name!r}. {near(name, known)}")
    names = [name for name in known if not options.columns or name in options.columns]
    if SAVES not in names and set(names) & set(LOADS):
        parser.error(f"{' and '.join(LOADS)} go on from what {SAVES} saves: name it too.")
    cells = recorded()
    rows = [
        row
        for row in EVERY
        if not options.missing
        or any(cells.get(name, {}).get(row, table.NOT_YET) == table.NOT_YET for name in names)
    ]
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        print(", ".join(some), flush=True)
        for do, these in ((results, [n for n in names if n not in ALONE]), (here, ALONE)):
            wanted = [name for name in these if name in names]
            keep(do(table.jobs(wanted, dict.fromkeys(wanted, some))) if wanted else {})


if __name__ == "__main__":
    main()
