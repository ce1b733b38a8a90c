"""The adapt recipe's table and picture, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Accuracy, size and time, one arm a row."""
    settings, arms, times = results["settings"], by_seed(results["arms"]), results["step_ms"]
    first = next(iter(arms))
    rows = [
        (
            arm,
            f"{statistics.mean(scores):.1f} %",
            ", ".join(f"{score:.1f}" for score in scores),
            f"{found[0]['trainable']:,}",
            f"{found[0]['bytes'] / 1e6:.2f} MB",
            f"{times[arm] / times[first]:.2f}",
        )
        for arm, found in arms.items()
        for scores in [_scores(found)]
    ]
    # The deviation of a share of so many sentences, at the accuracy of them all.
    share = statistics.mean(score for found in arms.values() for score in _scores(found)) / 100
    noise = 100 * (share * (1 - share) / settings["test"]) ** 0.5
    return [
        Table(
            ("", "accuracy", "by seed", "trained", "on disk", "step"),
            rows,
            f"{settings['steps']} steps of {settings['batch']} sentences",
            f"Accuracy on {settings['test']} held-out sentences, whose standard error is {noise:.1f} points. "
            "Trained: numbers, the head's too. Step: time of a training step, median, as a ratio to "
            f"{first}'s, the arms in turn.",
        )
    ]


def report(run: Run) -> None:
    """Print the table and draw the picture."""
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(1)
    ax = axes[0, 0]
    for i, (arm, found) in enumerate(by_seed(run.results["arms"]).items()):
        scores = _scores(found)
        colour = _report.COLOURS[i % len(_report.COLOURS)]
        x = found[0]["trainable"]
        ax.plot([x] * len(scores), scores, "o", color=colour, markersize=3, alpha=0.6)
        ax.plot(x, statistics.mean(scores), "D", color=colour)
        ax.annotate(arm, (x, statistics.mean(scores)), xytext=(6, -3), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.2)
    _report.label(ax, "Held-out accuracy; dots are seeds", "numbers trained", "%")
    _report.save(figure, run.folder / "adapt.png")


def _scores(found: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * result["accuracy"] for result in found]


def sweep(run: Run, arms: Sequence[str]) -> None:
    """Print the accuracy of every learning rate tried."""
    keys = [key.split("/") for key in run.results["arms"]]
    for arm in arms:
        tried = {lr: run.results["arms"][f"{a}/{lr}/{seed}"]["accuracy"] for a, lr, seed in keys if a == arm}
        line = ", ".join(f"{lr}: {100 * score:.1f}" for lr, score in tried.items())
        _report.console.print(f"{arm}: {line}")
