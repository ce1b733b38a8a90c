"""The experts recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run

HEADERS = ("", "test, %", "mean", "numbers in training", "kept", "multiply-adds")


def tables(results: dict[str, Any]) -> list[Table]:
    """From scratch and tuned: how test digits are read, and what that costs."""
    settings, arms = results["settings"], by_seed(results["arms"])
    tuned = {arm: found for arm, found in arms.items() if "test turned" in found[0]}
    scratch = {arm: found for arm, found in arms.items() if arm not in tuned}
    note = (
        "One number per seed, and their mean. Kept: numbers of the model as it is used. Multiply-adds: of a "
        "token in all FFNs then, a router's among them."
    )
    found: list[Table] = []
    if scratch:
        title = f"From scratch: {settings['steps']} steps of 100 of {settings['size']} digits"
        found.append(Table(HEADERS, _rows(scratch, "test"), title, f"{note} {_ends(scratch)}".strip()))
    if tuned:
        title = f"Tuned on {settings['size'] // 2} digits that are turned by {settings['angle']:g}° and paler"
        upright = ", ".join(f"{arm} {100 * mean(one['test'] for one in f):.1f}" for arm, f in tuned.items())
        more = f"Accuracy on turned test digits; upright ones afterwards: {upright}. {_ends(tuned)}".strip()
        found.append(Table(HEADERS, _rows(tuned, "test turned"), title, more))
    return found


def _rows(arms: Mapping[str, Any], view: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm, found in arms.items():
        rows.append(
            (
                arm,
                "/".join(f"{100 * one[view]:.1f}" for one in found),
                f"{100 * mean(one[view] for one in found):.1f}",
                *(f"{found[0][name]:,}" for name in ("numbers", "kept", "work")),
            )
        )
    return rows


def _ends(arms: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """How far experts are from one another at the end."""
    told: list[str] = []
    spreads = {arm: [one["spread"][-1][1] for one in found if one["spread"]] for arm, found in arms.items()}
    if any(spreads.values()):
        each = ", ".join(f"{arm} {mean(values):.3g}" for arm, values in spreads.items() if values)
        told.append(f"Experts' distance from their mean at the end, as a share of its norm: {each}.")
    for arm, found in arms.items():
        if "loads apart" in found[0]:
            value = mean(one["loads apart"] for one in found)
            told.append(
                f"In {arm}, the loads of the experts in two blocks differ by {value:.2f} (total variation)."
            )
    return " ".join(told)


def report(run: Run) -> None:
    """Print the tables and draw accuracy by arm, and how far experts are apart on the way."""
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(2)
    arms = by_seed(run.results["arms"])
    for number, (arm, found) in enumerate(arms.items()):
        view = "test turned" if "test turned" in found[0] else "test"
        colour = _report.COLOURS[number % len(_report.COLOURS)]
        values = [100 * one[view] for one in found]
        axes[0, 0].plot(values, [number] * len(values), "o", color=colour, markersize=4, alpha=0.6)
        axes[0, 0].plot([mean(values)], [number], "|", color=colour, markersize=16, markeredgewidth=2)
        spread = [one["spread"] for one in found if one["spread"]]
        if spread:
            steps = [step for step, _ in spread[0]]
            curves = [[value for _, value in one] for one in spread]
            _report.band(axes[0, 1], steps, curves, colour, arm)
    axes[0, 0].set_yticks(range(len(arms)), list(arms))
    axes[0, 0].invert_yaxis()
    _report.label(axes[0, 0], "Test digits read right, by seed", "%", "")
    _report.label(axes[0, 1], "Experts' distance from their mean", "step", "share of its norm")
    if axes[0, 1].lines:
        axes[0, 1].set_yscale("log")
        axes[0, 1].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "experts.png")
