"""The sequences recipe's table and picture, from its results."""

from __future__ import annotations

import statistics
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Accuracy by task, numbers that are trained, and seconds."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [
        (
            arm,
            *(ranged([one[task]["accuracy"] for one in found], "{:.1f}") for task in ("digits", "lag")),
            f"{found[0]['lag']['numbers']:,}",
            *(f"{statistics.mean(one[task]['seconds'] for one in found):.1f}" for task in ("digits", "lag")),
        )
        for arm, found in arms.items()
    ]
    lag = f"lag {settings['length']}"
    return [
        Table(
            ("mixer", "digits, %", f"{lag}, %", "numbers", "s, digits", f"s, {lag}"),
            rows,
            f"{settings['steps']} steps of {settings['batch']} sequences",
            f"Digits: 64 tokens, chance 10 %. {lag.capitalize()}: the class is in the first 8 of "
            f"{settings['length']} tokens, the rest is noise a tenth as loud; chance 12.5 %. Accuracy on "
            "sequences that were not trained on: the mean over seeds; in brackets the least and the most. "
            "Numbers: that are trained. s: seconds of a run with its tests, the mean; the machine had "
            "other work.",
        )
    ]


def report(run: Run) -> None:
    """Print the table and draw accuracy over steps."""
    _report.tell(tables(run.results))
    arms = by_seed(run.results["arms"])
    figure, axes = _report.canvas(2)
    titles = {"digits": "digits, dot after dot", "lag": f"lag of {run.settings['length']} tokens"}
    for ax, (task, title) in zip(axes.flat, titles.items(), strict=True):
        for number, (arm, found) in enumerate(arms.items()):
            steps = list(found[0][task]["curve"])
            means = [statistics.mean(one[task]["curve"][step] for one in found) for step in steps]
            colour = _report.COLOURS[number % len(_report.COLOURS)]
            style = "-" if number < len(_report.COLOURS) else "--"
            ax.plot([int(step) for step in steps], means, style, color=colour, label=arm, linewidth=1.2)
        _report.label(ax, title, "step", "test accuracy, %")
    axes.flat[0].legend(frameon=False, fontsize=7)
    _report.save(figure, run.folder / "sequences.png")
