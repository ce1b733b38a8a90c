"""The counterfactuals recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

Arms = Mapping[str, Sequence[dict[str, Any]]]
TITLES = {"new": "New seeds", "resampled": "New seeds and rows"}
STEPPED = ("closest", "confident", "trex-i")


COLUMNS = (
    ("new", "valid, new seeds, %", 100, "{:.1f}"),
    ("resampled", "valid, resampled, %", 100, "{:.1f}"),
    ("distance", "l2 distance", 1, "{:.2f}"),
    ("lof", "LOF", 1, "{:.2f}"),
    ("stability", "Stability", 1, "{:.2f}"),
    ("probability", "probability", 1, "{:.2f}"),
    ("reached", "tau reached, %", 100, "{:.0f}"),
)


def tables(results: dict[str, Any]) -> list[Table]:
    """What each arm's points are at the recipe's tau, and how well validity is foretold."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [
        (
            name,
            *(
                ranged([times * one[what] for one in at(logs, settings)], form)
                for what, _, times, form in COLUMNS
            ),
        )
        for name, logs in arms.items()
    ]
    accuracy = [one["accuracy"] for one in next(iter(arms.values()))]
    said = {kind: ranged([100 * one[kind] for one in accuracy], "{:.1f}") for kind in accuracy[0]}
    note = (
        f"Mean of the seeds, least and most. Valid: for how many of {settings['others']} other models, of "
        "new seeds, and of new seeds and training rows drawn with replacement. LOF: local outlier factor "
        "among training rows of the wanted class, 1 within them. Stability: measured with noise that no "
        "point was chosen by. Probability: what the model itself gives, which confident takes for its "
        f"Stability. Right on test rows: the model {said['model']} %, the others {said['new']} % and "
        f"{said['resampled']} %."
    )
    title = f"Counterfactuals of {settings['factuals']} rows, tau {settings['tau']:g}"
    headers = ("", *(header for _, header, _, _ in COLUMNS))
    return [Table(headers, rows, title, note + compared(arms, settings)), *foretold(arms)]


def compared(arms: Arms, settings: Mapping[str, Any]) -> str:
    """What the control has at T-Rex:I's distances, in a sentence."""
    if not {"confident", "trex-i"} <= arms.keys():
        return ""
    found: dict[str, list[float]] = {"new": [], "resampled": []}
    for control, wanted in zip(arms["confident"], at(arms["trex-i"], settings), strict=True):
        far = [one["distance"] for one in control["at"]]
        for kind, values in found.items():
            values.append(
                100 * float(np.interp(wanted["distance"], far, [one[kind] for one in control["at"]]))
            )
    new, resampled = (ranged(values, "{:.1f}") for values in found.values())
    return (
        f" Confident, asked for as much probability as takes it to trex-i's distance (between its points of "
        f"the picture): valid in {new} % and {resampled} %."
    )


def at(logs: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """Each seed's means at the recipe's tau."""
    return [one["at"][one["taus"].index(settings["tau"])] for one in logs]


def foretold(arms: Arms) -> list[Table]:
    """Rank correlations of what is known beforehand with the share of models that agree."""
    sets = {"all arms": list(arms), "stepped from the closest": [name for name in STEPPED if name in arms]}
    rows = [
        (
            f"{title}, {kind}",
            *(_correlation(arms, names, known, kind) for known in ("stability", "probability", "distance")),
        )
        for title, names in sets.items()
        if names
        for kind in ("new", "resampled")
    ]
    return [
        Table(
            ("points, models", "Stability", "probability", "distance"),
            rows,
            "What foretells validity: Spearman's rank correlation",
            "Over the points of the table above, seed by seed.",
        )
    ]


def _correlation(arms: Arms, names: Sequence[str], known: str, kind: str) -> str:
    from scipy.stats import spearmanr

    found: list[float] = []
    for logs in zip(*(arms[name] for name in names), strict=True):
        pairs = [[x for one in logs for x in one["each"][what]] for what in (known, kind)]
        if all(len(set(values)) > 1 for values in pairs):
            found.append(float(spearmanr(*pairs).statistic))
    return ranged(found, "{:.2f}") if found else "-"


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    arms = by_seed(run.results["arms"])
    figure, axes = _report.canvas(2)
    for ax, (kind, title) in zip(axes[0], TITLES.items(), strict=True):
        for colour, (name, logs) in zip(_report.COLOURS, arms.items(), strict=False):
            far, agree = (
                [mean(one["at"][i][what] for one in logs) for i in range(len(logs[0]["at"]))]
                for what in ("distance", kind)
            )
            ax.plot(far, [100 * v for v in agree], "o-", color=colour, label=name, markersize=4)
        ax.legend(frameon=False, fontsize=7)
        _report.label(ax, title, "l2 distance", "models that agree, %")
    _report.save(figure, run.folder / "counterfactuals.png")
