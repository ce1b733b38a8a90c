"""The adapt recipe's table and picture, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from . import _report
from ._run import Run


def _of(run: Run, arm: str) -> list[dict[str, Any]]:
    return [result for key, result in run.results["arms"].items() if key.split("/")[0] == arm]


def report(run: Run, arms: Sequence[str]) -> None:
    """Print the table and draw the picture."""
    times = run.results["step_ms"]
    columns: dict[str, dict[str, str]] = {}
    for arm in arms:
        results = _of(run, arm)
        scores = [100 * result["accuracy"] for result in results]
        line = {
            "accuracy": f"{statistics.mean(scores):.1f} %",
            "by seed": " / ".join(f"{score:.1f}" for score in scores),
            "trained": f"{results[0]['trainable']:,}",
            "on disk": f"{results[0]['bytes'] / 1e6:.2f} MB",
            "step": f"{times[arm] / times[arms[0]]:.2f}x",
        }
        for name, value in line.items():
            columns.setdefault(name, {})[arm] = value
    settings = run.settings
    _report.show(
        f"{settings['steps']} steps of {settings['batch']} sentences",
        columns,
        f"Accuracy on {settings['test']} held-out sentences. Trained: numbers, the head's too. Step: of "
        f"training, median, ratio to {arms[0]}, the arms in turn.",
    )
    _draw(run, arms)


def _draw(run: Run, arms: Sequence[str]) -> None:
    figure, axes = _report.canvas(1)
    ax = axes[0, 0]
    for i, arm in enumerate(arms):
        results = _of(run, arm)
        scores = [100 * result["accuracy"] for result in results]
        colour = _report.COLOURS[i % len(_report.COLOURS)]
        x = results[0]["trainable"]
        ax.plot([x] * len(scores), scores, "o", color=colour, markersize=3, alpha=0.6)
        ax.plot(x, statistics.mean(scores), "D", color=colour)
        ax.annotate(arm, (x, statistics.mean(scores)), xytext=(6, -3), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.2)
    _report.label(ax, "Held-out accuracy; dots are seeds", "numbers trained", "%")
    _report.save(figure, run.folder / "adapt.png")


def sweep(run: Run, arms: Sequence[str]) -> None:
    """Print the accuracy of every learning rate tried."""
    keys = [key.split("/") for key in run.results["arms"]]
    for arm in arms:
        tried = {lr: run.results["arms"][f"{a}/{lr}/{seed}"]["accuracy"] for a, lr, seed in keys if a == arm}
        line = ", ".join(f"{lr}: {100 * score:.1f}" for lr, score in tried.items())
        _report.console.print(f"{arm}: {line}")
