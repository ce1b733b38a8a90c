"""The qlora recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run


def tables(results: dict[str, Any]) -> list[Table]:
    """How alike the arms are, what merging costs, and memory."""
    settings, arms = results["settings"], by_seed(results["arms"])
    size = f"{settings['steps']} steps of {settings['batch']} x {settings['length']} tokens"
    made = [
        Table(
            (
                "",
                "first loss",
                "last loss",
                "held out",
                "merged",
                "merge, of weights",
                "merge, of change",
                "step",
            ),
            [(arm, *_cells(found, arms)) for arm, found in arms.items()],
            f"{size}, LoRA of rank {settings['rank']} on a base in nf4",
            f"{_apart(arms)}Merged: the loss on held-out text after merging into the codes. Merge: norm of "
            "the merged weights' error, as a share of that of the weights, and of the change that was "
            "merged. Step: time of a training step, median, as a ratio to the first arm's.",
        )
    ]
    if "memory" in results:
        made.append(_memory(results["memory"], arms))
    return made


def _cells(found: Sequence[dict[str, Any]], arms: dict[str, list[Any]]) -> list[str]:
    usual = next(iter(arms.values()))
    ratios = [one["step_ms"] / other["step_ms"] for one, other in zip(found, usual, strict=False)]
    return [
        ranged([one["loss"][0] for one in found], "{:.4f}"),
        ranged([one["loss"][-1] for one in found], "{:.4f}"),
        ranged([one["held_out"] for one in found], "{:.4f}"),
        ranged([one["merged"] for one in found], "{:.4f}"),
        ranged([100 * one["merge"]["relative"] for one in found], "{:.3f}%"),
        ranged([100 * one["merge"]["of_change"] for one in found], "{:.0f}%"),
        ranged(ratios, "{:.2f}"),
    ]


def _apart(arms: dict[str, list[Any]]) -> str:
    """The largest difference of two arms' losses at one step, in words."""
    if len(arms) < 2:
        return ""
    one, other = list(arms.values())[:2]
    return f"Losses of one step differ by {apart(one, other):.1e} at most. "


def apart(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """The largest difference of losses at one step, over all seeds."""
    seeds = zip(one, other, strict=False)
    return max(abs(x - y) for a, b in seeds for x, y in zip(a["loss"], b["loss"], strict=True))


def _memory(memory: dict[str, Any], arms: dict[str, list[Any]]) -> Table:
    def mb(value: float | None) -> str:
        return "" if value is None else f"{value / 1e6:,.1f}"

    rows: list[tuple[str, ...]] = []
    for name, found in memory.items():
        adapter = next((one["bytes"] for one in arms.get(name, ())), None)
        peak, before = found["peak"], found["before"]
        grew = None if peak is None or before is None else peak - before
        rows.append((name, mb(found["base"]), mb(adapter), mb(before), mb(peak), mb(grew)))
    return Table(
        ("", "base", "adapter file", "process before", "process at most", "of it, training"),
        rows,
        "MB of memory",
        "Base: all weights, in 4-bit arms with their scales; embeddings and head stay in float32. Process: "
        "what the system says that it held, after loading and at most in three steps; the libraries are in "
        "both.",
    )


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    arms = by_seed(run.results["arms"])
    _report.tell(tables(run.results))
    figure, axes = _report.canvas(2)
    for colour, (arm, found) in zip(_report.COLOURS, arms.items(), strict=False):
        curves = [one["loss"] for one in found]
        style = "-" if arm == next(iter(arms)) else "--"
        _report.band(axes[0, 0], range(1, len(curves[0]) + 1), curves, colour, arm, style)
    _report.label(axes[0, 0], "Training loss, mean and range of seeds", "step", "loss")
    axes[0, 0].legend(frameon=False, fontsize=8)
    base = {name: found["base"] / 1e6 for name, found in run.results.get("memory", {}).items()}
    _report.bars(axes[0, 1], base, "{:.0f}")
    _report.label(axes[0, 1], "Bytes of the base", "", "MB")
    _report.save(figure, run.folder / "qlora.png")
