"""The modes recipe's tables and picture, from its results."""

from __future__ import annotations

import statistics
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

ENVIRONMENTS = {"control": "env", "harder": "harder_env"}
"""Parts that act in an environment, and the options that name theirs."""
_ENOUGH = 0.05


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    settings, arms = results["settings"], by_seed(results["arms"])
    found: list[Table] = []
    if peaks := {name: logs for name, logs in arms.items() if name.startswith("peaks")}:
        rows = [
            (
                name.removeprefix("peaks: "),
                ranged([one["at"] for one in logs], "{:.1f}", "{:d}"),
                ranged([sum(s > _ENOUGH for s in one["shares"]) for one in logs], "{:.1f}", "{:d}"),
                ranged([max(one["w"]) for one in logs], "{:.2f}"),
                ranged([one["reward"] for one in logs], "{:.2f}"),
            )
            for name, logs in peaks.items()
        ]
        found.append(
            Table(
                ("routing", "peaks with a primitive", "peaks with actions", "largest w", "reward"),
                rows,
                f"Four peaks, {settings['steps']} steps, K={settings['k']}",
                "Peaks with a primitive: its mean is within 0.15, the peaks' width. With actions: more than "
                "5 % of them are within twice that. Reward: the mean of 10,000 actions; 1 at a peak. The "
                "mean over seeds, in brackets the least and the most. Unimodal: one Gaussian, by SAC's "
                "losses. Freq: the best primitive of a state learns; all: all do; soft: the best by Q and "
                "entropy. Gumbel hard: straight-through.",
            )
        )
    return found + [
        _returns(control, settings[option], settings["env_steps"])
        for part, option in ENVIRONMENTS.items()
        if (control := {name: logs for name, logs in arms.items() if name.startswith(part)})
    ]


def _returns(arms: dict[str, list[Any]], environment: str, steps: int) -> Table:
    rows = [
        (
            name.partition(": ")[2],
            ranged([one["return"] for one in logs], "{:.1f}"),
            ranged([statistics.mean(one["curve"].values()) for one in logs], "{:.1f}"),
        )
        for name, logs in arms.items()
    ]
    return Table(
        ("policy", "return", "mean along the curve"),
        rows,
        f"{environment}, {steps} steps",
        "Return: of 10 episodes after the last step, without noise but for the draw of a primitive; the "
        "curve's 20 points are of 5 episodes each, and their mean is the area under it.",
    )


def report(run: Run) -> None:
    """Print the tables and draw rewards and returns over steps."""
    _report.tell(tables(run.results))
    titles = {"peaks": ("Four peaks", "reward")}
    titles |= {part: (run.settings[option], "return") for part, option in ENVIRONMENTS.items()}
    figure, axes = _report.canvas(len(titles))
    for ax, (part, (title, unit)) in zip(axes[0], titles.items(), strict=True):
        logs = {n: found for n, found in by_seed(run.results["arms"]).items() if n.startswith(part)}
        for colour, (name, found) in zip(_report.COLOURS, logs.items(), strict=False):
            steps = [int(step) for step in found[0]["curve"]]
            curves = [list(one["curve"].values()) for one in found]
            _report.band(ax, steps, curves, colour, name.partition(": ")[2])
        if logs:
            ax.legend(frameon=False, fontsize=7)
        _report.label(ax, title, "step", unit)
    _report.save(figure, run.folder / "modes.png")
