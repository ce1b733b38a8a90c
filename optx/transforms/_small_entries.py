"""Which entries of a model's weights are small: a share's threshold, masks, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optx._names import whole

_LOW = 16  # bits of a float32 that the second count tells apart


def small(p: Tensor, threshold: float) -> Tensor:
    """Whether each entry's size is below a threshold; bool, sharded as the weight is."""
    size = p.detach().abs()
    # A 16-bit tensor would be compared with the threshold rounded to 16 bits.
    return (size if size.dtype == torch.float64 else size.to(torch.float32)) < threshold


def threshold_of_share(weights: Sequence[Tensor], share: float) -> float:
    """The least float32 that so many of all entries are below, to the nearest whole number, and their ties.

    Two counts of the sizes' bits, one tensor at a time: nothing is sorted, and it is exact.

    Args:
        weights: any shapes and float dtypes, with at least one entry in all.
        share: above 0, at most 1.
    """
    wanted = max(1, round(share * sum(p.numel() for p in weights)))
    high = torch.zeros(1 << (31 - _LOW), dtype=torch.int64)
    for p in weights:
        high += torch.bincount(_codes(p) >> _LOW, minlength=high.numel()).cpu()
    upper = int(torch.searchsorted(high.cumsum(0), wanted))
    wanted -= int(high[:upper].sum())
    low = torch.zeros(1 << _LOW, dtype=torch.int64)
    for p in weights:
        codes = _codes(p)
        codes = codes[codes >> _LOW == upper] & ((1 << _LOW) - 1)
        low += torch.bincount(codes, minlength=low.numel()).cpu()
    code = (upper << _LOW) + int(torch.searchsorted(low.cumsum(0), wanted)) + 1  # the next float32
    return float(torch.tensor(code, dtype=torch.int32).view(torch.float32))


def _codes(p: Tensor) -> Tensor:
    """Sizes as whole numbers of the same order: the bits of a positive float32."""
    return whole(p.detach()).abs().to(torch.float32).reshape(-1).view(torch.int32)


@dataclass(frozen=True)
class Row:
    """One parameter in a `Density`.

    Attributes:
        name: the optimizer's for it, or the model's.
        shape: of the weight.
        selected: how many of its entries are trained.
        numel: how many it has.
    """

    name: str
    shape: tuple[int, ...]
    selected: int
    numel: int

    @property
    def share(self) -> float:
        """Of its entries, that is trained; nan where it has none."""
        return self.selected / self.numel if self.numel else math.nan


class Density:
    """How many entries of each weight are trained: a table with one `Row` a parameter. Print it.

    Attributes:
        rows: in the optimizer's order.
        threshold: what the selected were below when they were selected.
        reselected: whether there was a re-selection.
    """

    def __init__(self, rows: Iterable[Row], threshold: float, reselected: bool) -> None:
        self.rows = tuple(rows)
        self.threshold, self.reselected = threshold, reselected

    @property
    def selected(self) -> int:
        """Of all weights together."""
        return sum(row.selected for row in self.rows)

    @property
    def numel(self) -> int:
        """Of all weights together."""
        return sum(row.numel for row in self.rows)

    @property
    def share(self) -> float:
        """The selected share of all entries."""
        return self.selected / self.numel if self.numel else math.nan

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<Density: {self.selected:,} of {self.numel:,} numbers ({self.share:.1%}) trained>"

    def __str__(self) -> str:
        table = [("name", "shape", "trained", "of", "share")]
        for row in self.rows:
            share = f"{row.share:.1%}" if row.numel else "-"
            table.append((row.name, str(row.shape), f"{row.selected:,}", f"{row.numel:,}", share))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = ("<", "<", ">", ">", ">")
        lines = [
            "  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True))
            for row in table
        ]
        again = ", selected again since" if self.reselected else ""
        lines.append(
            f"{self.selected:,} of {self.numel:,} numbers trained ({self.share:.1%}): below "
            f"{self.threshold:g} in size{again}"
        )
        return "\n".join(lines)
