"""The flatness recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended."""
    settings, step = results["settings"], results["step"]
    headers = ("", "steps", "test, %", "fit, %", "eigenvalue", "rise", "step", "held, kB")
    return [
        Table(
            headers,
            [(arm, *_cells(arm, logs, step)) for arm, logs in by_seed(results["arms"]).items()],
            f"{settings['steps']} steps of {settings['batch']} digits, {100 * settings['wrong']:.0f} % of "
            "the labels random",
            "Mean and, in brackets, range over seeds. Test: 797 digits with their own labels. Fit: of the "
            "training labels, random ones included. Eigenvalue: the largest of the training loss's Hessian. "
            "Rise: of that loss on a step of length 0.05 along its gradient. Step: time as a ratio to SGD's "
            f"{step['ms']:.1f} ms, "
            "median, all kinds in turn and all losses on. Held: by the loss, from step to step.",
        )
    ]


def _cells(arm: str, logs: Sequence[dict[str, Any]], step: dict[str, float]) -> tuple[str, ...]:
    def each(name: str, form: str, by: float = 1.0) -> str:
        return ranged([by * log[name] for log in logs], form)

    return (
        str(logs[0]["steps"]),
        each("test", "{:.1f}", 100),
        each("train", "{:.1f}", 100),
        each("eigenvalue", "{:.1f}"),
        each("rise", "{:.3f}"),
        f"{step[arm.partition(' of ')[0]]:.2f}",
        f"{logs[0]['bytes'] / 1e3:.0f}",
    )


def report(run: Run) -> None:
    """Print the table and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    arms, step = by_seed(run.results["arms"]), run.results["step"]
    figure, axes = _report.canvas(2)
    left, right = axes[0]
    kinds = [arm for arm in arms if " of " not in arm]
    for colour, arm in zip(_report.COLOURS, kinds, strict=False):
        curves = [log["curve"] for log in arms[arm]]
        at = [step[arm] * epoch for epoch in range(len(curves[0]))]
        _report.band(left, at, curves, colour, arm)
    _report.label(left, "Clean test accuracy", "time, in epochs of SGD", "accuracy")
    left.legend(frameon=False, fontsize=8)
    for colour, arm in zip(_report.COLOURS, kinds, strict=False):
        ends = [(log["eigenvalue"], log["test"]) for log in arms[arm]]
        right.scatter(*zip(*ends, strict=True), color=colour, s=22)
    right.set_xscale("log")
    _report.label(right, "At the end, by seed", "largest eigenvalue", "accuracy")
    _report.save(figure, run.folder / "flatness.png")
