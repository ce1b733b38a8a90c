"""The meta recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

Arms = Mapping[str, Sequence[dict[str, Any]]]

COLUMNS = {
    "curves": (("error", "squared error", 1, "{:.3f}"), ("covered", "covered, %", 100, "{:.0f}")),
    "plays": (
        ("accuracy", "right, %", 100, "{:.1f}"),
        ("ece", "calibration error, %", 100, "{:.1f}"),
        ("nll", "nats", 1, "{:.3f}"),
    ),
}
TITLES = {"curves": "Sine curves", "plays": "Which of two plays"}
NOTES = {
    "curves": "Squared error of the mean of 40 draws on 20 points, after 5 steps on 10. Covered: points in "
    "the interval between the 5 % and 95 % quantiles of the draws, of which 90 % should be; what draws "
    "nothing has no interval.",
    "plays": "Passages told right after 5 steps on 5 of each play, the expected calibration error (15 "
    "intervals) of the mean probability of 40 draws, and its negative log-likelihood; chance is 50 %, 0.693 "
    "nats.",
}


def kinds(results: Mapping[str, Any]) -> dict[str, Arms]:
    """By kind of task and arm, one result a seed."""
    found: dict[str, dict[str, Any]] = {}
    for key, one in by_seed(results["arms"]).items():
        kind, arm = key.split("-")
        found.setdefault(kind, {})[arm] = one
    return found


def tables(results: Mapping[str, Any]) -> list[Table]:
    """How each arm does, by kind of task."""
    settings = results["settings"]
    made: list[Table] = []
    for kind, arms in kinds(results).items():
        rows = [
            (
                arm,
                *(
                    ranged([times * one[name] for one in found], form)
                    for name, _, times, form in COLUMNS[kind]
                ),
                "/".join(f"{one['lr']:g}" for one in found),
            )
            for arm, found in arms.items()
        ]
        headers = ("", *(title for _, title, _, _ in COLUMNS[kind]), "rate")
        title = f"{TITLES[kind]}: {settings['steps']} steps of {settings['tasks']} tasks"
        note = f"Mean of the seeds, least and most, on {settings['tests']} other tasks. {NOTES[kind]}"
        made.append(Table(headers, rows, title, f"{note} Rate: of adaptation, by seed."))
    return made


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    found = kinds(run.results)
    shown = [(kind, *COLUMNS[kind][i]) for kind in found for i in range(2)]
    figure, axes = _report.canvas(len(shown))
    for ax, (kind, name, title, times, form) in zip(axes.flat, shown, strict=True):
        values = {arm: times * mean(one[name] for one in some) for arm, some in found[kind].items()}
        _report.bars(ax, values, form)
        _report.label(ax, f"{TITLES[kind]}: {title}")
    _report.save(figure, run.folder / "meta.png")
