"""The compress recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

UNITS = {"digits": ("accuracy, %", 100.0, "{:.1f}"), "characters": ("loss, nats", 1.0, "{:.3f}")}


def tables(results: dict[str, Any]) -> list[Table]:
    """For each task, what every strength leaves of it, and in how many bits."""
    settings = results["settings"]
    return [made for arm, runs in by_seed(results["arms"]).items() for made in _of_task(arm, runs, settings)]


def _of_task(arm: str, runs: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[Table]:
    unit, times, form = UNITS[arm]

    def cells(found: Sequence[dict[str, Any]], *path: str, scale: float = 1.0, form: str = "{:.2f}") -> str:
        values: list[float] = []
        for one in found:
            value: Any = one
            for key in path:
                value = value[key]
            values.append(scale * value)
        return ranged(values, form)

    first: list[tuple[str, ...]] = []
    then: list[tuple[str, ...]] = []
    for kappa in runs[0]:
        found = [run[kappa] for run in runs]
        score = {"scale": times, "form": form}
        first.append(
            (
                f"kappa {kappa}",
                cells(found, "trained", "score", **score),
                cells(found, "trained", "rounded", **score),
                *(cells(found, "trained", "bits", coder) for coder in ("exp-golomb", "golomb", "entropy")),
                cells(found, "trained", "zeros", scale=100.0, form="{:.0f}"),
                cells(found, "trained", "shape"),
            )
        )
        then.append(
            (
                f"kappa {kappa}",
                cells(found, "deepshape", "at once", "rounded", **score),
                cells(found, "deepshape", "at once", "bits", "exp-golomb"),
                cells(found, "deepshape", "tuned", "rounded", **score),
                cells(found, "deepshape", "tuned", "bits", "exp-golomb"),
                cells(found, "rf8", "score", **score),
            )
        )
    return [
        Table(
            ("", unit, "rounded", "Exp-Golomb", "Golomb", "entropy", "zeros, %", "shape"),
            first,
            f"{arm}: {settings['steps']} steps, BackSlash in the first {settings['until']:.0%} of them",
            f"Mean (least to most of the seeds). Rounded: to multiples of {settings['step']:g}. Bits: "
            "by Exp-Golomb codes, by the Golomb codes of ComPEFT's files, and the entropy of single levels. "
            "Shape: nu of the trained weights.",
        ),
        Table(
            ("", f"DeepShape, {unit}", "its bits", f"tuned, {unit}", "its bits then", f"RF8, {unit}"),
            then,
            f"{arm}: DeepShape and RF8 of the same models",
            f"Rounded as above; bits by Exp-Golomb codes. Tuned: {settings['tune']} steps later. RF8 has 8 "
            "bits a weight.",
        ),
    ]


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    _report.tell(tables(run.results))
    arms = by_seed(run.results["arms"])
    figure, axes = _report.canvas(3)
    for ax, (arm, runs) in zip(axes[0], arms.items(), strict=False):
        unit, times, _ = UNITS[arm]
        for colour, kappa in zip(_report.COLOURS, runs[0], strict=False):
            found = [one[kappa] for one in runs]
            bits = [one["trained"]["bits"]["exp-golomb"] for one in found]
            ax.plot(
                bits, [times * one["trained"]["rounded"] for one in found], "o", color=colour, label=kappa
            )
            tuned = [one["deepshape"]["tuned"] for one in found]
            moved = [one["bits"]["exp-golomb"] for one in tuned]
            ax.plot(moved, [times * one["rounded"] for one in tuned], "x", color=colour, markersize=5)
        ax.legend(frameon=False, fontsize=8, title="kappa", title_fontsize=8)
        _report.label(ax, f"{arm} (crosses: DeepShape, tuned)", "bits a weight", unit)
    _draw_shapes(axes[0, 2], next(iter(arms.values())), run.results["settings"]["steps"])
    _report.save(figure, run.folder / "compress.png")


def _draw_shapes(ax: Any, runs: Sequence[dict[str, Any]], steps: int) -> None:
    """What becomes of the first task's shape in training."""
    for colour, kappa in zip(_report.COLOURS, runs[0], strict=False):
        curves = [run[kappa]["trained"]["shapes"] for run in runs]
        if curves[0]:
            middle = [mean(column) for column in zip(*curves, strict=True)]
            at = [steps * i / len(middle) for i in range(len(middle))]
            ax.plot(at, middle, color=colour, linewidth=1.3, label=kappa)
    _report.label(ax, "Shape of the weights, first task", "training step", "nu")
