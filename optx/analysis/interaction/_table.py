"""A diagnostic's result as a table, for rich consoles and for ``print``."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names on the left, numbers on the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for number, title in enumerate(head):
        found.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        found.add_row(*map(Text, row))  # not markup: names may have brackets
    return found


def printed(table: Table) -> str:
    """As plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=400, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
