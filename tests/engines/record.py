"""Run the table of engines and methods, and write what came out: ``python tests/engines/record.py``.

All cells of the columns that are named, or of all, go into recipes/results/engines.json beside those that are
there; ``python -m optx.recipes._pages write`` puts them on the page. What the tests run is a part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import table
from engines.tasks import ROWS
from engines.teams import results

from optx._errors import near
from optx._files import written_aside
from optx.recipes import _pages, _run

FILE = Path(__file__).resolve().parents[2] / "recipes/results/engines.json"


def record(columns: Sequence[str]) -> dict[str, Any]:
    """Run some columns; all results, the others' as they were."""
    rows = {name: [row.name for row in ROWS] for name in columns}
    made = table.cells(results(list(table.phases(columns, rows))))
    told = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    every = told["cells"] | made
    return {
        "settings": {},
        "environment": _run.environment(),
        "kinds": {row.name: row.kind for row in ROWS},
        "cells": {name: every[name] for name in table.BY_TITLE if name in every},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Record what is named."""
    known = list(table.BY_TITLE)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("columns", nargs="*", metavar="COLUMN", help=f"of: {'; '.join(known)}")
    names = parser.parse_args(arguments).columns or known
    for name in names:
        if name not in known:
            parser.error(f"there is no column {name!r}. {near(name, known)}")
    told = record(names)
    with written_aside(FILE) as aside:
        aside.write_text(_pages.written(_pages.rounded(told)) + "\n")
    for name in names:
        for row, cell in told["cells"][name].items():
            for line in table.complaints(name, row, cell):
                print(line, flush=True)


if __name__ == "__main__":
    main()
