"""The formats recipe's tables and picture, from its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL = "float32"


def tables(results: dict[str, Any]) -> list[Table]:
    """A table a task: what each format's seeds came to."""
    return [_table(name, arms, results["settings"]) for name, arms in _tasks(results).items()]


def _tasks(results: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """What every seed came to, by task and format."""
    found: dict[str, dict[str, list[Any]]] = {}
    for arm, seeds in by_seed(results["arms"]).items():
        name, _, kept = arm.partition("/")
        found.setdefault(name, {})[kept] = seeds
    return found


def _table(name: str, arms: dict[str, list[Any]], settings: dict[str, Any]) -> Table:
    rows = [
        [
            kept,
            ranged([one["held_out"] for one in seeds], "{:.4f}"),
            ranged(_differences(arms, kept), "{:+.4f}") if kept != USUAL and USUAL in arms else "",
            f"{seeds[0]['resident_bytes']:.3f}",
        ]
        for kept, seeds in arms.items()
    ]
    headers = ["", "held-out loss", f"less {USUAL}'s of the seed", "bytes a parameter"]
    return Table(headers, rows, _title(name, settings), _note(arms))


def _title(name: str, settings: dict[str, Any]) -> str:
    if name == "characters":
        size = f"{settings['layers']} layers of width {settings['width']}"
        return f"characters from scratch: {size}, {settings['steps']} steps"
    return f"a language model tuned: {settings['tuning_steps']} steps of {settings['tuning_length']} tokens"


def _note(arms: dict[str, list[Any]]) -> str:
    """Whether seeds differ more than formats do, in words."""
    others = [kept for kept in arms if kept != USUAL]
    if USUAL not in arms or not others or (noise := _noise(arms)) == 0:
        return "Means, least and most over seeds."
    shares = [f"{kept} {max(map(abs, _differences(arms, kept))) / noise:.2f}" for kept in others]
    return (
        f"Means, least and most over seeds. {USUAL}'s seeds lie {noise:.4f} apart; in parts of that, the "
        f"greatest difference from {USUAL} in a seed: {', '.join(shares)}. Bytes: weights, gradients, state."
    )


def _differences(arms: dict[str, list[Any]], kept: str) -> list[float]:
    """Each seed's held-out loss at the end, less float32's of the same seed."""
    pairs = zip(arms[kept], arms[USUAL], strict=True)
    return [one["held_out"] - usual["held_out"] for one, usual in pairs]


def _noise(arms: dict[str, list[Any]]) -> float:
    ends = [one["held_out"] for one in arms[USUAL]]
    return max(ends) - min(ends)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    _report.save(drawn(run.results), run.folder / "formats.png")


def drawn(results: dict[str, Any]) -> Figure:
    """Held-out losses less float32's, a point a seed, in a band as wide as float32's seeds lie apart."""
    tasks = _tasks(results)
    figure, axes = _report.canvas(len(tasks))
    for ax, (name, arms) in zip(axes[0], tasks.items(), strict=True):
        others = [kept for kept in arms if kept != USUAL] if USUAL in arms else []
        for place, (colour, kept) in enumerate(zip(_report.COLOURS, others, strict=False)):
            points = _differences(arms, kept)
            ax.plot([place] * len(points), points, "o", color=colour, alpha=0.7)
        if others:
            half = _noise(arms) / 2
            ax.axhspan(-half, half, color="black", alpha=0.08, linewidth=0)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(others)), others)
        ax.margins(x=0.3)
        _report.label(ax, _title(name, results["settings"]).split(":")[0], "", f"loss less {USUAL}'s")
    return figure
