"""What a recipe shows: tables on the terminal and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from optx._files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

console = Console(highlight=False)

# Okabe and Ito's colours, told apart by most colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def show(title: str, arms: Mapping[str, Mapping[str, str]], caption: str | None = None) -> None:
    """Print a table: one column per arm, and one line for each of the numbers that the first arm has."""
    numbers = next(iter(arms.values()))
    rows = [[number, *(arm[number] for arm in arms.values())] for number in numbers]
    show_rows(title, ["", *arms], rows, caption)


def show_rows(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> None:
    """Print a table, given row by row; what stands right of the first column is numbers."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


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


def mean_and_range(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Pointwise mean, minimum and maximum of equally long curves."""
    points = list(zip(*curves, strict=True))
    return [sum(p) / len(p) for p in points], [min(p) for p in points], [max(p) for p in points]
