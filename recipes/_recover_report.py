"""The recover recipe's table and picture, from its results."""

from __future__ import annotations

from typing import Any

from . import _report
from ._recover_parts import ARMS, DATA
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [
        (
            name,
            DATA[ARMS[name].data],
            f"{ARMS[name].alpha:g}",
            str(ARMS[name].rank or settings["size"]),
            ranged([one["error"][-1] for one in logs], "{:.1e}"),
        )
        for name, logs in arms.items()
    ]
    size = settings["size"]
    return [
        Table(
            ("", "data", "start", "columns", "relative error"),
            rows,
            f"{settings['steps']} steps, a {size} x {size} matrix of rank {settings['rank']} from "
            f"{settings['measurements']} measurements",
            "Relative error: |U U^T - X| / |X|. Start: the largest singular value of the first U. Steps of "
            "SubGM begin at 0.25 and are 0.98 times the one before; constant ones are of 0.05; least squares "
            "descends at 0.05, Adam from 0.1 by a cosine to 0 (0.005 and 0.02 end higher). Huber: SciPy's "
            "least_squares with f_scale=0.1 (1: ten times the error), at most as many evaluations as the "
            "others take steps.",
        )
    ]


def report(run: Run) -> None:
    """Print the table and draw the picture."""
    _report.tell(tables(run.results))
    _draw(run, by_seed(run.results["arms"]))


def _draw(run: Run, arms: dict[str, list[Any]]) -> None:
    figure, axes = _report.canvas(3)
    panels = (
        ("Outliers: the start's scale", [n for n in arms if n == "subgm" or n.startswith("subgm start")]),
        ("Outliers: other methods", [n for n in arms if ARMS[n].data == "outliers" and " start" not in n]),
        ("Clean data, and noise", [n for n in arms if ARMS[n].data != "outliers"]),
    )
    for ax, (title, names) in zip(axes[0], panels, strict=True):
        for colour, name in zip(_report.COLOURS * 2, names, strict=False):
            logs = arms[name]
            errors = [one["error"] for one in logs]
            if ARMS[name].method == "huber":
                middle, _, _ = _report.mean_and_range(errors)
                ax.axhline(middle[-1], color=colour, linestyle=":", label=name, linewidth=1.4)
                continue
            _report.band(ax, logs[0]["step"], errors, colour, name)
        ax.set_yscale("log")
        if names:
            ax.legend(frameon=False, fontsize=7)
        _report.label(ax, title, "step", "relative error")
    _report.save(figure, run.folder / "recover.png")
