"""The grokking recipe's table and picture, from its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run

GENERALISED = 0.95


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended, one number a seed."""
    settings = results["settings"]
    return [
        Table(
            ("", "train, %", "test, %", "95 % in test at", "collapsed, max %", "gradient, min"),
            [(arm, *_cells(logs)) for arm, logs in by_seed(results["arms"]).items()],
            f"a + b mod {settings['p']}, {settings['steps']} epochs",
            f"One number per seed, measured every {settings['every']} epochs. Accuracies are the last ones. "
            "Collapsed: training samples whose normaliser is the true class's term alone.",
        )
    ]


def report(run: Run) -> None:
    """Print the table, draw the picture, and add the epochs of generalisation to results.json."""
    arms = by_seed(run.results["arms"])
    run.results["generalised_at"] = {arm: [first_epoch(log) for log in logs] for arm, logs in arms.items()}
    run.write()
    _report.tell(tables(run.results))
    _draw(run, arms)


def first_epoch(log: dict[str, list[float]]) -> int | None:
    """The first epoch measured at which test accuracy is at least 95 %; None if there is none."""
    measured = zip(log["epoch"], log["test"], strict=True)
    return next((int(epoch) for epoch, accuracy in measured if accuracy >= GENERALISED), None)


def _cells(logs: Sequence[dict[str, list[float]]]) -> Iterator[str]:
    def each(values: Iterable[float | None], form: str) -> str:
        return "/".join("never" if value is None else form.format(value) for value in values)

    yield each((100 * log["train"][-1] for log in logs), "{:.1f}")
    yield each((100 * log["test"][-1] for log in logs), "{:.1f}")
    yield each((first_epoch(log) for log in logs), "{}")
    yield each((100 * max(log["collapse"]) for log in logs), "{:.1f}")
    yield each((min(log["gradient"]) for log in logs), "{:.0e}")


def _draw(run: Run, logs: dict[str, Any]) -> None:
    figure, axes = _report.canvas(2, 2)
    panels = (
        ("test", "Test accuracy (dashed: training set)", "accuracy"),
        ("collapse", "Softmax collapse on the training set", "share of samples"),
        ("gradient", "Norm of the gradient", "norm"),
        ("alignment", "What perpGrad removes (in the last layer)", "cos(w, -gradient)"),
    )
    for ax, (name, title, y) in zip(axes.flat, panels, strict=True):
        for colour, (arm, found) in zip(_report.COLOURS, logs.items(), strict=False):
            epochs = [e + 1 for e in found[0]["epoch"]]
            _report.band(ax, epochs, [log[name] for log in found], colour, arm)
            if name == "test":
                train = _report.mean_and_range([log["train"] for log in found])[0]
                ax.plot(epochs, train, "--", color=colour, linewidth=1, alpha=0.7)
        _report.label(ax, title, "epoch", y)
    axes[0, 0].set_xscale("log")
    axes[1, 0].set_yscale("log")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _report.save(figure, run.folder / "grokking.png")
