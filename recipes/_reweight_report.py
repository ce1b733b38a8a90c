"""The reweight recipe's tables and picture, from its results."""

from __future__ import annotations

import statistics
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._reweight_parts import KINDS
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended, and the weights that it gave."""
    settings, arms = results["settings"], by_seed(results["arms"])
    first = next(iter(arms))
    rows = [
        (
            arm,
            ranged([log["held_out"][-1] for log in logs]),
            ranged(_apart(logs, arms[first]), "{:+.3f}"),
            ranged([at_time(log) for log in logs]),
            *(ranged([last(log["weights"][kind]) for log in logs], "{:.2f}") for kind in KINDS),
            ranged([last(log["losses"]["duplicated"]) for log in logs], "{:.2f}"),
            ranged([log["cost"] for log in logs], "{:.3f}"),
        )
        for arm, logs in arms.items()
    ]
    headers = (
        *("", "held-out loss", f"less {first}'s", "at equal time"),
        *(f"weight, {kind}" for kind in KINDS),
        *("loss, duplicated", "a step"),
    )
    return [
        Table(
            headers,
            rows,
            f"{settings['steps']} steps of {settings['batch']} x {settings['length']} characters",
            "Losses in nats a character, on clean text; differences are of the same seed. At equal time: at "
            "the step that is reached when all plain steps are done, between the measurements around it. "
            "Weights: 1 is the mean's; they, and the loss on what is duplicated, are of the second half of "
            "the steps. A step: its time with weights by that of the same one without, median of 30 pairs.",
        )
    ]


def _apart(logs: list[Any], base: list[Any]) -> list[float]:
    return [a["held_out"][-1] - b["held_out"][-1] for a, b in zip(logs, base, strict=True)]


def last(values: list[float]) -> float:
    """The mean of a curve's second half."""
    return statistics.mean(values[len(values) // 2 :])


def at_time(log: dict[str, Any]) -> float:
    """The held-out loss when as much time was spent as that many plain steps take, by the paired cost."""
    step = log["step"][-1] / max(log["cost"], 1.0)  # nothing was measured later, if a step was cheaper
    after = next(place for place, found in enumerate(log["step"]) if found >= step)
    if after == 0:
        return log["held_out"][0]
    (a, b), (x, y) = log["step"][after - 1 : after + 1], log["held_out"][after - 1 : after + 1]
    return x + (y - x) * (step - a) / (b - a)


def report(run: Run) -> None:
    """Print the table and draw the picture."""
    _report.tell(tables(run.results))
    _draw(run, by_seed(run.results["arms"]))


def _draw(run: Run, arms: dict[str, list[Any]]) -> None:
    figure, axes = _report.canvas(2, 2)
    base = next(iter(arms.values()))
    for colour, (arm, logs) in zip(_report.COLOURS, arms.items(), strict=False):
        for ax, curves in (
            (axes[0, 0], [log["held_out"] for log in logs]),
            (
                axes[0, 1],
                [
                    [x - y for x, y in zip(log["held_out"], other["held_out"], strict=True)]
                    for log, other in zip(logs, base, strict=True)
                ],
            ),
        ):
            _report.band(ax, logs[0]["step"], curves, colour, arm)
        for style, kind in zip(("-", ":", "--"), KINDS, strict=True):
            mean = _report.mean_and_range([log["weights"][kind] for log in logs])[0]
            axes[1, 0].plot(logs[0]["step"], mean, style, color=colour, linewidth=1.2)
            mean = _report.mean_and_range([log["losses"][kind] for log in logs])[0]
            axes[1, 1].plot(logs[0]["step"], mean, style, color=colour, linewidth=1.2)
    _report.label(axes[0, 0], "Loss on held-out, clean text", "step", "nats a character")
    _report.label(axes[0, 1], f"Less that of {next(iter(arms))}, by seed", "step", "nats a character")
    _report.label(axes[1, 0], "Weights: clean (-), noisy (..), duplicated (--)", "step", "1 is the mean's")
    _report.label(axes[1, 1], "Losses of these in training", "step", "nats a character")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "reweight.png")
