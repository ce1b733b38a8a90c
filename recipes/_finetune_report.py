"""The finetune recipe's table and picture, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _report
from ._run import Run


def report(run: Run, arms: Sequence[str]) -> None:
    """Print the table, draw the picture, and add the derived numbers to results.json."""
    before, results = run.results["before"], {arm: run.results["arms"][arm] for arm in arms}
    first = results[arms[0]]
    for result in results.values():
        _, held_out, general = result["curve"][-1]
        result["held_out"] = held_out
        result["forgetting"] = general - before["general"]
        result["optimizer_ratio"] = result["optimizer_ms"] / first["optimizer_ms"]
        result["step_ratio"] = result["step_ms"] / first["step_ms"]
    run.write()
    _report.show(
        f"{run.settings['steps']} steps, lr {run.settings['lr']:g}, seed {run.settings['seed']}",
        {arm: _row(result, before) for arm, result in results.items()},
        f"Before: {before['held_out']:.3f} held out, {before['general']:.3f} general English. Forgetting: "
        f"general English after minus before; below 0, it got better. Times: medians, ratios to {arms[0]}.",
    )
    _draw(run, results)


def _row(result: dict[str, Any], before: dict[str, float]) -> dict[str, str]:
    return {
        "held-out loss": f"{result['held_out']:.3f} ({result['held_out'] - before['held_out']:+.3f})",
        "forgetting": f"{result['forgetting']:+.4f}",
        "L2 moved": f"{result['distance']:.3f}",
        "optimizer state": f"{result['state_bytes'] / 1e6:,.0f} MB",
        "optimizer step": f"{result['optimizer_ms']:.0f} ms ({result['optimizer_ratio']:.2f}x)",
        "train step": f"{result['step_ms']:.0f} ms ({result['step_ratio']:.2f}x)",
    }


def _draw(run: Run, results: dict[str, Any]) -> None:
    figure, axes = _report.canvas(3)
    before = run.results["before"]
    for colour, (arm, result) in zip(_report.COLOURS, results.items(), strict=False):
        steps, held_out, general = zip(
            [0, before["held_out"], before["general"]], *result["curve"], strict=True
        )
        axes[0, 0].plot(steps, held_out, "o-", color=colour, label=arm, markersize=3)
        axes[0, 1].plot(steps, general, "o-", color=colour, markersize=3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    _report.label(axes[0, 0], "Learned: loss on held-out text", "step", "nats per token")
    _report.label(axes[0, 1], "Kept: loss on general English", "step", "nats per token")
    _report.bars(axes[0, 2], {arm: result["forgetting"] for arm, result in results.items()})
    _report.label(axes[0, 2], "Forgetting (general English, after minus before)", y="nats per token")
    _report.save(figure, run.folder / "finetune.png")
