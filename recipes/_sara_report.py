"""The sara recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

REACHED = 0.9  # of the best accuracy on turned digits, for what is left of upright ones by then


def best_rate(logs: Sequence[dict[str, Any]]) -> str:
    """The learning rate that reads kept-back turned digits best, mean over seeds."""
    return max(logs[0]["rates"], key=lambda lr: mean(log["rates"][lr]["choose"] for log in logs))


def left_when_reached(log: dict[str, Any], wanted: float) -> float | None:
    """How upright digits are read when turned ones first are as wanted, at the best rate for that."""
    found = [
        next((old for old, new in zip(one["old"], one["new"], strict=True) if new >= wanted), None)
        for one in log["rates"].values()
    ]
    return max((old for old in found if old is not None), default=None)


def tables(results: dict[str, Any]) -> list[Table]:
    """How both views are read, and what the smallest weights are worth."""
    settings, arms = results["settings"], by_seed(results["arms"])
    runs = {arm: [log["rates"][best_rate(logs)] for log in logs] for arm, logs in arms.items()}
    wanted = REACHED * max(mean(one["new"][-1] for one in found) for found in runs.values())
    least = min(mean(one["step_ms"] for one in found) for found in runs.values())
    before = [log["before"] for log in next(iter(arms.values()))]
    rows = [
        (
            arm,
            best_rate(arms[arm]),
            ranged([100 * one["new"][-1] for one in found], "{:.1f}"),
            ranged([100 * one["old"][-1] for one in found], "{:.1f}"),
            _reached(arms[arm], wanted),
            _shares(found),
            f"{mean(one['state_bytes'] for one in found) / 1000:.0f}",
            f"{mean(one['step_ms'] for one in found) / least:.2f}",
        )
        for arm, found in runs.items()
    ]
    reached = f"upright at {100 * wanted:.0f} %"
    first = Table(
        ("", "rate", "turned, %", "upright, %", reached, "trained, %", "state, kB", "step"),
        rows,
        f"Digits turned by {settings['angle']:g}°, {settings['steps']} steps of {settings['batch']}",
        "Accuracy on test digits at the rate that is best on kept-back turned ones; mean (least and most of "
        f"the seeds). Before: {100 * mean(b['new'] for b in before):.1f} turned, "
        f"{100 * mean(b['old'] for b in before):.1f} upright. Upright at {100 * wanted:.0f} %: when turned "
        "digits are first read so, at the rate that keeps most by then. Trained: share of all numbers, and "
        "after the re-selection. State: of the optimizer. Step: median time, as a ratio.",
    )
    shares = [f"{100 * n / len(results['zeroed'][0]):.0f} %" for n in range(len(results["zeroed"][0]))]
    second = Table(
        ("smallest set to 0", *shares),
        [("upright, %", *(f"{100 * mean(one):.1f}" for one in zip(*results["zeroed"], strict=True)))],
        "What the smallest weights are worth",
        "Accuracy of the network before it is trained on turned digits, mean over seeds.",
    )
    return [first, second]


def _reached(logs: Sequence[dict[str, Any]], wanted: float) -> str:
    found = [left_when_reached(log, wanted) for log in logs]
    there = [100 * one for one in found if one is not None]
    if not there:
        return "not reached"
    return ranged(there, "{:.1f}") + (f", {len(there)} of {len(found)}" if len(there) < len(found) else "")


def _shares(found: Sequence[dict[str, Any]]) -> str:
    shares = [[100 * share for share in one["selected"]] for one in found if one["selected"]]
    if not shares:
        return "-"
    first, last = (mean(one[i] for one in shares) for i in (0, -1))
    return f"{first:.1f}" if first == last else f"{first:.1f}, {last:.1f}"


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(3)
    arms = by_seed(run.results["arms"])
    for colour, (arm, logs) in zip(_report.COLOURS, arms.items(), strict=False):
        found = [log["rates"][best_rate(logs)] for log in logs]
        for number, view in enumerate(("new", "old")):
            _report.band(axes[0, number], found[0]["step"], [one[view] for one in found], colour, arm)
    _report.label(axes[0, 0], "Turned digits", "step", "accuracy")
    _report.label(axes[0, 1], "Upright digits", "step", "accuracy")
    axes[0, 0].legend(frameon=False, fontsize=8)
    middle, low, high = _report.mean_and_range(run.results["zeroed"])
    share = [100 * n / len(middle) for n in range(len(middle))]
    axes[0, 2].plot(share, middle, "o-", color=_report.COLOURS[0], markersize=4, linewidth=1.2)
    axes[0, 2].fill_between(share, low, high, color=_report.COLOURS[0], alpha=0.18, linewidth=0)
    _report.label(axes[0, 2], "Upright, smallest weights set to 0", "% of all weights", "accuracy")
    _report.save(figure, run.folder / "sara.png")
