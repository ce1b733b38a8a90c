"""The domains recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Accuracy on angles that were held out, and the toy's."""
    settings, arms, times = results["settings"], by_seed(results["arms"]), results["step_ms"]
    shortest = min(times[arm] for arm in arms)
    angles = list(next(iter(arms.values()))[0]["unseen"])
    rows = [
        (
            arm,
            ranged([100 * unseen(log, angles) for log in logs], "{:.1f}"),
            ranged([100 * unseen(log, angles, shortest / times[arm]) for log in logs], "{:.1f}"),
            *(f"{100 * mean(unseen(log, [angle]) for log in logs):.1f}" for angle in angles),
            ranged([100 * mean(log["seen"].values()) for log in logs], "{:.1f}"),
            f"{times[arm] / shortest:.2f}",
        )
        for arm, logs in arms.items()
    ]
    held = [f"held out {angle}°, %" for angle in angles]
    digits = Table(
        ("", "held out, %", "in equal time, %", *held, "training angles, %", "step"),
        rows,
        f"Digits at an angle that was held out, {settings['steps']} steps of "
        f"{len(angles) - 1} x {settings['batch']}",
        "Accuracy: mean over the six angles held out (least and most of the seeds), and by angle. In equal "
        "time: after as long as the fastest arm's whole run. Training angles: on digits kept back from them. "
        "Step: median time of a training step, as a ratio, the arms in turn.",
    )
    toy = Table(
        ("", "unseen, %", "seen, %", "invariant |w|", "spurious |w|", "spurious/invariant S"),
        [(arm, *_toy(found)) for arm, found in results["spurious"].items()],
        "Spurious features, 600 steps of gradient descent",
        "Accuracy in a domain where the spurious features point the other way, and in the three trained on; "
        "mean size of the weights; how many times the variance of the domains' gradients is that of the "
        "others. Five seeds.",
    )
    return [digits, toy]


def _toy(found: Sequence[dict[str, float]]) -> list[str]:
    forms = {
        "unseen": "{:.1f}",
        "seen": "{:.1f}",
        "invariant": "{:.2f}",
        "spurious": "{:.2f}",
        "ratio": "{:.1f}",
    }
    percent = ("unseen", "seen")
    return [
        ranged([run[name] * (100 if name in percent else 1) for run in found], form)
        for name, form in forms.items()
    ]


def unseen(log: dict[str, Any], angles: Sequence[str], share: float = 1.0) -> float:
    """Mean accuracy on angles held out, after a share of the steps."""
    last = max(i for i, step in enumerate(log["step"]) if i == 0 or step <= share * log["step"][-1])
    return mean(log["unseen"][angle][last] for angle in angles)


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(3)
    arms = by_seed(run.results["arms"])
    angles = list(next(iter(arms.values()))[0]["unseen"])
    for colour, (arm, logs) in zip(_report.COLOURS, arms.items(), strict=False):
        curves = [[mean(point) for point in zip(*log["unseen"].values(), strict=True)] for log in logs]
        time = [step * run.results["step_ms"][arm] / 1000 for step in logs[0]["step"]]
        _report.band(axes[0, 0], time, curves, colour, arm)
        held = [mean(unseen(log, [angle]) for log in logs) for angle in angles]
        axes[0, 1].plot([int(a) for a in angles], held, "o-", color=colour, linewidth=1.2, markersize=4)
    _report.label(axes[0, 0], "Digits at held-out angles", "seconds of training", "accuracy")
    _report.label(axes[0, 1], "By the angle held out", "degrees", "accuracy")
    axes[0, 0].legend(frameon=False, fontsize=8)
    toy = {arm: mean(one["unseen"] for one in found) for arm, found in run.results["spurious"].items()}
    _report.bars(axes[0, 2], toy, "{:.2f}")
    _report.label(axes[0, 2], "Spurious features: unseen domain", "", "accuracy")
    _report.save(figure, run.folder / "domains.png")
