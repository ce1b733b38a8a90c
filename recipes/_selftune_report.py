"""The selftune recipe's table and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended, one number a seed."""
    settings = results["settings"]
    arms = by_seed(results["arms"])
    first = arms.get("stn") or next(iter(arms.values()))
    rows = [(arm, *_cells(found, first)) for arm, found in arms.items()]
    return [
        Table(
            ("", "validation loss", "test loss", "test, %", "dropout", "noise", "time"),
            rows,
            f"{settings['steps']} steps of 64 of {settings['size']} digits",
            "One number per seed, at the end of a run. Dropout and noise: of the grid its best point by "
            "validation loss, of stn the values at the end. Time: training of all that the arm took, as a "
            "ratio to the first arm's of the same seed.",
        )
    ]


def _cells(found: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> list[str]:
    def each(name: str, form: str, times: float = 1) -> str:
        return "/".join(form.format(times * one[name]) for one in found)

    ratios = (one["seconds"] / other["seconds"] for one, other in zip(found, first, strict=False))
    return [
        each("valid", "{:.3f}"),
        each("test", "{:.3f}"),
        each("accuracy", "{:.1f}", 100),
        each("drop", "{:.2f}"),
        each("noise", "{:.2f}"),
        "/".join(f"{ratio:.2f}" for ratio in ratios),
    ]


def thinned(history: dict[str, list[float]], points: int = 100) -> dict[str, list[float]]:
    """Every so many of its values, for the picture."""
    every = max(1, len(history["batches"]) // points)
    return {name: values[::every] for name, values in history.items()}


def report(run: Run) -> None:
    """Print the table and draw the schedules that were discovered."""
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(1, 2)
    arms = by_seed(run.results["arms"])
    tuned = {arm: found for arm, found in arms.items() if "history" in found[0]}
    for ax, name, title in zip(
        axes.flat, ("drop", "noise"), ("Dropout rate", "Noise on the input"), strict=True
    ):
        for colour, (arm, found) in zip(_report.COLOURS, tuned.items(), strict=False):
            for number, one in enumerate(found):
                label = arm if number == 0 else None
                ax.plot(
                    one["history"]["batches"], one["history"][name], color=colour, label=label, linewidth=1.1
                )
        for one in arms.get("grid of whole runs", ()):
            ax.axhline(one[name], color="0.6", linewidth=0.8, linestyle=":")
        _report.label(ax, f"{title} (dotted: the grid's best)", "training step", "value")
    if tuned:
        axes.flat[0].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "selftune.png")
