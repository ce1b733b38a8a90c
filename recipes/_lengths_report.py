"""The lengths recipe's table and picture, from its results."""

from __future__ import annotations

from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """Loss and entropy by length."""
    settings, arms = results["settings"], by_seed(results["arms"])
    times = list(next(iter(arms.values()))[0])
    rows = [
        (
            arm,
            *(ranged([one[t]["loss"] for one in found]) for t in times),
            *(f"{mean(one[t]['entropy'] for one in found):.2f}" for t in (times[0], times[-1])),
        )
        for arm, found in arms.items()
    ]
    length = settings["length"]
    heads = [f"loss at {int(t) * length}" for t in times]
    return [
        Table(
            ("", *heads, f"entropy at {length}", f"at {int(times[-1]) * length}"),
            rows,
            f"{settings['steps']} steps of {settings['batch']} x {length} characters",
            "Loss: per held-out character, in nats, in sequences of so many, each counted from its first; "
            "mean over seeds (least and most). Entropy: of attention's weights in the last eighth of a "
            "sequence, in nats, mean over rows, heads, layers and seeds.",
        )
    ]


def report(run: Run) -> None:
    """Print the table; draw loss and entropy over length."""
    _report.tell(tables(run.results))
    length, arms = run.results["settings"]["length"], by_seed(run.results["arms"])
    figure, axes = _report.canvas(3)
    for colour, (arm, found) in zip(_report.COLOURS, arms.items(), strict=False):
        lengths = [int(t) * length for t in found[0]]
        for ax, name in zip(axes.flat, ("loss", "last", "entropy"), strict=True):
            curves = [[at[name] for at in one.values()] for one in found]
            _report.band(ax, lengths, curves, colour, arm, "o-")
    titles = ("All characters", "The last eighth of a sequence", "Attention in the last eighth")
    for ax, title, y in zip(axes.flat, titles, ("loss, nats", "loss, nats", "entropy, nats"), strict=True):
        ax.set_xscale("log", base=2)
        _report.label(ax, title, "characters in a sequence", y)
    axes.flat[0].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "lengths.png")
