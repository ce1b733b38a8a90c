"""The table of `Shapes`: a row a parameter, with the parameters of repeated layers in one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from optx.scaling._width import Width

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, ...]
HEAD = ("name", "shape", "base", "kind", "fan-in", "fan-out", "m")


def rows(widths: Iterable[Width]) -> list[Row]:
    """The cells, folded: ``layers.{0..29}.weight`` where all that a row says is the same."""
    alike: dict[tuple[str, Row], list[Width]] = {}
    for width in widths:
        key = width.name if width.tied else _pattern(width.name)
        alike.setdefault((key, _cells(width)), []).append(width)
    found: list[Row] = []
    for (_, cells), group in alike.items():
        folded = _folded([width.name for width in group])
        names = [folded] if folded else [width.name for width in group]
        found += [(name + _tied(group[0].tied), *cells) for name in names]
    return found


def text(widths: Sequence[Width]) -> str:
    """The table as plain text, as wide as it needs to be."""
    from rich.console import Console

    out = io.StringIO()
    made = rows(widths)
    longest = max((sum(map(len, row)) for row in [HEAD, *made]), default=0)
    Console(file=out, width=4 * longest + 80, color_system=None).print(_table(made))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(widths: Sequence[Width]) -> Table:
    """The table for a rich console."""
    return _table(rows(widths))


def _table(made: Sequence[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for i, title in enumerate(HEAD):
        found.add_column(title, justify="right" if i > 3 else "left", overflow="fold")
    for row in made:
        found.add_row(*map(Text, row))  # not markup: names may have brackets
    return found


def _cells(width: Width) -> Row:
    shape, base = (" x ".join(map(str, sizes)) or "()" for sizes in (width.shape, width.base_shape))
    numbers = (f"{ratio:.6g}" for ratio in (width.fan_in, width.fan_out, width.m))
    return (shape, base, width.kind, *numbers)


def _tied(names: Sequence[str]) -> str:
    return "".join(f"\n= {name}" for name in names)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _pattern(name: str) -> str:
    return _NUMBER.sub("{}", name)


def _folded(names: Sequence[str]) -> str | None:
    """Names that differ in numbers alone as one, if every combination of the numbers is there."""
    numbers = [list(map(int, _NUMBER.findall(name))) for name in names]
    places = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if prod(map(len, places)) != len(names):
        return None
    spans = map(_span, places)
    return _NUMBER.sub(lambda _: next(spans), names[0])  # not by format: names may have braces


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
