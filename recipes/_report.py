"""What a recipe shows: tables, on the terminal and on the results page, and one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from optx._files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

console = Console(highlight=False)

# Okabe and Ito's colours, told apart by most colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Table:
    """What was measured, as words: the terminal and the results page show the same ones.

    Args:
        headers: of the columns; the first is that of the rows' names.
        rows: a name, and a cell for each other column.
        title: in one line.
        note: sentences under it: what the columns are, and what else follows from the results.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def laid(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Headers and rows; turned by a quarter where a row has more numbers than there are rows."""
        if len(self.headers) <= len(self.rows) + 1:
            return self.headers, self.rows
        turned = list(zip(self.headers, *self.rows, strict=True))
        return turned[0], turned[1:]


def tell(tables: Iterable[Table]) -> None:
    """Print tables."""
    for one in tables:
        headers, rows = one.laid()
        shown = RichTable(box=SIMPLE)
        for number, header in enumerate(headers):
            shown.add_column(
                header, justify="right" if number else "left", no_wrap=not number, overflow="fold"
            )
        for row in rows:
            shown.add_row(*map(Text, row))  # as it stands: brackets would be rich's markup
        # Not as the table's own title and caption: those are as narrow as it is.
        console.print(one.title, style="bold", markup=False)
        console.print(shown)
        console.print(one.note + "\n", markup=False)


def by_seed(arms: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The results of every arm, one for each seed; their keys are ``arm/seed``."""
    found: dict[str, list[Any]] = {}
    for key, result in arms.items():
        found.setdefault(key.rpartition("/")[0], []).append(result)
    return found


def ranged(values: Sequence[float], form: str = "{:.3f}", ends: str | None = None) -> str:
    """The mean and, in brackets, the least and the most of what every seed has; one number if all look alike.

    Args:
        values: one a seed.
        form: of the mean.
        ends: of the others, if another.
    """
    mean = form.format(statistics.mean(values))
    low, high = ((ends or form).format(v) for v in (min(values), max(values)))
    return mean if len(values) == 1 or mean == low == high else f"{mean} ({low} to {high})"


def canvas(columns: int, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with ``rows`` x ``columns`` axes in the house style, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), dpi=140, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=8)
    return figure, axes


def label(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title on the left, axis names."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def bars(ax: Axes, values: Mapping[str, float], form: str = "{:+.3f}") -> None:
    """One labelled bar per name, coloured in order, from a zero line."""
    names = list(values)
    drawn = ax.bar(range(len(names)), list(values.values()), color=COLOURS[: len(names)], width=0.6)
    ax.bar_label(drawn, [form.format(v) for v in values.values()], fontsize=8, padding=2)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.margins(y=0.15)
    ax.set_xticks(range(len(names)), [n.replace("+", "\n+ ") for n in names])


def save(figure: Figure, path: Path) -> None:
    """Write a picture aside and rename it."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
    console.print(f"Wrote {path} and {path.with_name('results.json')}")


def band(
    axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, name: str, style: str = "-"
) -> None:
    """The mean of the seeds' curves, and a band from their least to their most; dots with a style of "o-"."""
    middle, low, high = mean_and_range(curves)
    axes.plot(
        x, middle, style, color=colour, label=name, linewidth=1.2 if "o" in style else 1.4, markersize=4
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def mean_and_range(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Pointwise mean, minimum and maximum of equally long curves."""
    points = list(zip(*curves, strict=True))
    return [sum(p) / len(p) for p in points], [min(p) for p in points], [max(p) for p in points]
