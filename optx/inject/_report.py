"""The table that says what was added to which module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One served module.

    Attributes:
        module: its path.
        injection: what was attached, with its options.
        note: what exactly was added there.
        trainable: numbers that an optimizer can move.
        stored: numbers that are saved (frozen bases of an SVD too).
    """

    module: str
    injection: str
    note: str
    trainable: int
    stored: int


@dataclass(frozen=True)
class Report:
    """What was added to a model; ``print(report)`` shows it as a table.

    Attributes:
        rows: one per served module.
        total: numbers in the model with all that is attached.
    """

    rows: Sequence[Row]
    total: int

    @property
    def trainable(self) -> int:
        """Numbers that an optimizer can move, in all."""
        return sum(row.trainable for row in self.rows)

    @property
    def stored(self) -> int:
        """Numbers that a file holds, in all."""
        return sum(row.stored for row in self.rows)

    def __str__(self) -> str:
        head = ("module", "injection", "added", "trainable", "stored")
        cells = [
            head,
            *((r.module, r.injection, r.note, f"{r.trainable:,}", f"{r.stored:,}") for r in self.rows),
            ("in all", "", "", f"{self.trainable:,}", f"{self.stored:,}"),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        share = f"{100 * self.trainable / self.total:.3g} % of the model's {self.total:,} numbers"
        return "\n".join([line.rstrip() for line in lines] + [share])
