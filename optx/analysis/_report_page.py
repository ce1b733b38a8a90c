"""A report as one page: in a terminal, as a picture, as HTML."""

from __future__ import annotations

import base64
import html
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optx._files import written_aside
from optx.analysis.interaction._table import printed, table


@dataclass(frozen=True)
class Section:
    """What one diagnostic says.

    Attributes:
        title: its name.
        head: of the columns; the first has names.
        rows: a name and numbers, as words.
        note: what the numbers are: exact, certified or an estimate.
        values: the numbers by name, which the picture draws; may be empty.
        axis: what ``values`` are.
        seconds: how long it took.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    axis: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `optx.analysis.report` found; ``print`` shows it, rich too.

    Attributes:
        title: of what.
        sections: what applied, by title.
        left_out: what did not, and why, by title.
    """

    title: str
    sections: Mapping[str, Section]
    left_out: Mapping[str, str]

    def __getitem__(self, title: str) -> Section:
        if title in self.sections:
            return self.sections[title]
        why = f"it does not apply: {self.left_out[title]}" if title in self.left_out else "there is no such"
        raise KeyError(f"{title!r}: {why}")

    def __str__(self) -> str:
        parts = [self.title, ""]
        for one in self.sections.values():
            parts += [one.title, printed(table(one.head, one.rows)), *([one.note] if one.note else []), ""]
        parts += ["Left out", *(f"  {title}: {why}" for title, why in self.left_out.items())]
        return "\n".join(parts if self.left_out else parts[:-1]).rstrip()

    def __rich__(self) -> Any:
        """For a rich console."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self.title, style="bold")]
        for one in self.sections.values():
            parts += [Text(f"\n{one.title}", style="bold"), table(one.head, one.rows)]
            parts += [Text(one.note, style="dim")] if one.note else []
        if self.left_out:
            parts.append(Text("\nLeft out", style="bold"))
            parts += [Text(f"  {title}: {why}") for title, why in self.left_out.items()]
        return Group(*parts)

    def picture(self, path: str | Path) -> None:
        """Write a panel for each section that has values, as PNG.

        Args:
            path: of the file; it is written aside and renamed. Needs matplotlib.
        """
        with written_aside(Path(path).expanduser()) as aside:
            aside.write_bytes(self._png())

    def html(self, path: str | Path) -> None:
        """Write one page that needs no other file.

        Args:
            path: of the file; it is written aside and renamed. Needs matplotlib.
        """
        picture = base64.b64encode(self._png()).decode()
        parts = [f"<h1>{html.escape(self.title)}</h1>"]
        parts.append(f'<img alt="the values of all sections" src="data:image/png;base64,{picture}">')
        for one in self.sections.values():
            parts += [f"<h2>{html.escape(one.title)}</h2>", _html_table(one)]
            parts += [f"<p>{html.escape(one.note)}</p>"] if one.note else []
        if self.left_out:
            left = "".join(
                f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.left_out.items()
            )
            parts.append(f"<h2>Left out</h2><dl>{left}</dl>")
        head = f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        page = f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
        with written_aside(Path(path).expanduser()) as aside:
            aside.write_text(page, encoding="utf-8")

    def _png(self) -> bytes:
        from matplotlib.figure import Figure

        drawn = [one for one in self.sections.values() if _finite(one)]
        columns = min(3, max(len(drawn), 1))
        rows = max(math.ceil(len(drawn) / columns), 1)
        figure = Figure(figsize=(4.4 * columns, 3.0 * rows + 0.4), dpi=140, layout="constrained")
        axes: Any = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(drawn) :]:
            ax.axis("off")
        for ax, one in zip(axes.flat, drawn, strict=False):
            _bars(ax, one)
        figure.suptitle(self.title, fontsize=10)  # pyright: ignore[reportUnknownMemberType]
        out = io.BytesIO()
        figure.savefig(out, format="png")  # pyright: ignore[reportUnknownMemberType]
        return out.getvalue()


_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}h2{margin-bottom:.2em}p,dd{color:#555}"
)
_MOST = 40  # bars of a panel: the largest


def _finite(one: Section) -> dict[str, float]:
    return {name: value for name, value in one.values.items() if math.isfinite(value)}


def _bars(ax: Any, one: Section) -> None:
    """A bar a name, in the model's order; on a log scale where sizes are far apart."""
    values = _finite(one)
    if len(values) > _MOST:
        largest = sorted(values, key=lambda name: -abs(values[name]))[:_MOST]
        values = {name: value for name, value in values.items() if name in largest}
    ax.barh(range(len(values)), list(values.values()), color="#0072B2", height=0.7)
    ax.set_yticks(
        range(len(values)), [_short(name) for name in values], fontsize=5 if len(values) > 12 else 7
    )
    ax.invert_yaxis()
    positive = [value for value in values.values() if value > 0]
    if len(positive) == len(values) and max(positive) > 100 * min(positive):
        ax.set_xscale("log")
    if one.axis.startswith("share"):
        ax.set_xlim(0, 1)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_xlabel(one.axis, fontsize=7)
    ax.set_title(one.title, loc="left", fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"...{name[-26:]}"


def _html_table(one: Section) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in one.head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in one.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began
