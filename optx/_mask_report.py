"""The table of masks: of each weight its shape, zeros, sparsity and pattern."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optx._mask_bits import layout, ones, unpack

if TYPE_CHECKING:
    from rich.table import Table

_GROUPS = (2, 4, 8, 16, 32)
_HEAD = ("name", "shape", "zeros", "sparsity", "pattern")


@dataclass(frozen=True)
class MaskRow:
    """One weight.

    Attributes:
        name: of the parameter.
        shape: of it.
        zeros: how many of its numbers are masked.
        sparsity: their share.
        pattern: ``"2:4"`` if exactly 2 of every 4 numbers in a row of the flattened weight are masked (and so
            for other groups of up to 32; the smallest is told); ``"2:4 by columns"`` if it is so down the
            columns, as inputs run in transformers' ``Conv1D``; ``"rows"`` if every row has as many zeros as
            every other; else ``"free"``.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    sparsity: float
    pattern: str


@dataclass(frozen=True)
class MaskReport:
    """What `optx.Masks.report` says; ``print`` shows it as a table, and rich's too.

    Attributes:
        rows: one a weight.
    """

    rows: Sequence[MaskRow]

    @property
    def total(self) -> MaskRow:
        """All weights in one row; its pattern is theirs if they have one, else ``"mixed"``."""
        numel = sum(_numel(row.shape) for row in self.rows)
        zeros = sum(row.zeros for row in self.rows)
        patterns = {row.pattern for row in self.rows}
        pattern = patterns.pop() if len(patterns) == 1 else "mixed"
        return MaskRow("in all", (numel,), zeros, zeros / max(numel, 1), pattern)

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        widest = max(len(row.name) for row in self.rows)
        Console(file=out, width=widest + 200, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> Table:
        """The table for a rich console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        found = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, show_footer=True)
        for title, last in zip(_HEAD, _cells(self.total), strict=True):
            right = title in ("zeros", "sparsity")
            found.add_column(title, Text(last), justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            found.add_row(*map(Text, _cells(row)))  # not markup: names may have brackets
        return found


def report_of(masks: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> MaskReport:
    """The table of names, shapes and packed bits."""
    rows: list[MaskRow] = []
    for name, shape, bits in masks:
        numel = _numel(shape)
        zeros = numel - ones(bits)
        pattern = pattern_of(unpack(bits, layout(shape))) if zeros else "none"
        rows.append(MaskRow(name, shape, zeros, zeros / max(numel, 1), pattern))
    return MaskReport(tuple(rows))


def pattern_of(kept: Tensor) -> str:
    """The pattern of a mask of rows and columns; see `MaskRow`."""
    for matrix, where in ((kept, ""), (kept.t(), " by columns")):
        for group in _GROUPS:
            found = _in_groups(matrix, group)
            if found:
                return f"{found}:{group}{where}"
    zeros = (~kept).sum(1)
    return "rows" if len(kept) > 1 and bool((zeros == zeros[0]).all()) else "free"


def _in_groups(kept: Tensor, group: int) -> int:
    """How many of every ``group`` numbers in a row are masked; 0 if that is not one number."""
    rows, length = kept.shape
    if length % group or (length <= group and rows == 1):
        return 0
    found = -1
    for part in (kept[:1], kept):  # the first row decides most
        counts = group - part.reshape(len(part), -1, group).sum(2, dtype=torch.int32)
        found = int(counts.flatten()[0])
        if not 0 < found < group or not bool((counts == found).all()):
            return 0
    return found


def _numel(shape: tuple[int, ...]) -> int:
    rows, length = layout(shape)
    return rows * length


def _cells(row: MaskRow) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape)) or "()"
    return (row.name, shape, f"{row.zeros:,}", f"{row.sparsity:.2%}", row.pattern)
