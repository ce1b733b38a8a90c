"""The finetune recipe's table, answers and picture, from its results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from . import _formats, _report
from ._run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3
"""Answers that are shown; results.json has all."""


def line(arm: str, point: dict[str, float]) -> str:
    """A point of an arm's curve, while it trains."""
    general, answers = point["drift_general"], point["drift_answers"]
    where = f"{general:.3f} (general), {answers:.3f} (answers)"
    return f"{arm}, step {point['step']}: held out {point['held_out']:.3f}, drift {where}"


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a column per arm, a row per number; over seeds, their mean and range."""
    arms = _report.by_seed(results["arms"])
    first = next(iter(arms.values()))

    def row(name: str, form: str, number: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(_report.ranged([number(one) for one in found], form) for found in arms.values())]

    def ratio(name: str, key: str) -> list[str]:
        whole = statistics.mean(found[key] for found in first)
        return row(name, "{:.2f}", lambda found: found[key] / whole)

    def last(key: str) -> Callable[[dict[str, Any]], float]:
        return lambda found: found["curve"][-1][key]

    rows = [
        row("held-out loss", "{:.3f}", last("held_out")),
        row("drift, general", "{:.3f}", last("drift_general")),
        row("drift, answers", "{:.3f}", last("drift_answers")),
        row("tokens kept", "{:.1%}", last("same_tokens")),
        row("general loss", "{:.3f}", last("general")),
        row("L2 moved", "{:.2f}", lambda found: found["distance"]),
        row("gradients, MB", "{:,.0f}", lambda found: found["gradient_bytes"] / 1e6),
        row("optimizer state, MB", "{:,.0f}", lambda found: found["state_bytes"] / 1e6),
        ratio("optimizer step", "optimizer_ms"),
        ratio("training step", "step_ms"),
    ]
    if _formats.words(results["settings"]):
        resident = row("bytes a parameter", "{:.3f}", lambda found: found["resident_bytes"])
        rows.insert(-2, resident)
    return ["", *arms], rows


def tables(results: dict[str, Any]) -> list[_report.Table]:
    """The same as the terminal and the results page show it."""
    return [_report.Table(*table(results), title(results), caption(results))]


def caption(results: dict[str, Any]) -> str:
    """What the rows of the table are."""
    before, first = results["before"], next(iter(_report.by_seed(results["arms"])))
    return (
        f"Losses before: {before['held_out']:.3f} held out, {before['general']:.3f} on general English. "
        "Drift: KL(pretrained || tuned) of the next token in nats a token, on general English and on the "
        f"model's own answers to {len(before['prompts'])} prompts, made before. Tokens kept: the share of "
        f"those answers still chosen. Times: medians, ratios to {first}."
    )


def title(results: dict[str, Any]) -> str:
    """The setting."""
    settings, seeds = results["settings"], len(next(iter(_report.by_seed(results["arms"]).values())))
    size = f"{settings['batch']} x {settings['length']}"
    asked = (f"{seeds} seed{'s' * (seeds > 1)}", _formats.words(settings))
    return (
        f"{settings['steps']} steps of {size} tokens, lr {settings['lr']:g}, {', '.join(filter(None, asked))}"
    )


def report(run: Run, arms: Sequence[str]) -> None:
    """Print answers and table, and draw the picture."""
    run.write()
    chosen = {key: found for key, found in run.results["arms"].items() if key.split("/")[0] in arms}
    results = run.results | {"arms": chosen}
    _answers(results)
    _report.tell(tables(results))
    _report.save(drawn(results), run.folder / "finetune.png")


def _answers(results: dict[str, Any]) -> None:
    """Some answers before and after, side by side; of the first seed."""
    before = results["before"]
    told = {"before": before["answers"]}
    told |= {arm: found[0]["answers"] for arm, found in _report.by_seed(results["arms"]).items()}
    for i, prompt in enumerate(before["prompts"][:SHOWN]):
        side_by_side = Table(box=SIMPLE)
        for name in told:
            side_by_side.add_column(Text(name), ratio=1, overflow="fold")
        side_by_side.add_row(*(Text(texts[i]) for texts in told.values()))
        _report.console.print(Text(prompt, style="bold"))
        _report.console.print(side_by_side)


_KINDS = {"drift_general": "on general English", "drift_answers": "on its own answers"}


def drawn(results: dict[str, Any]) -> Figure:
    """Drift against held-out loss along training: a line per arm, the mean over seeds; thin ones per seed."""
    figure, axes = _report.canvas(len(_KINDS))
    before = {"step": 0} | results["before"]
    for ax, (kind, where) in zip(axes[0], _KINDS.items(), strict=True):
        arms = _report.by_seed(results["arms"]).items()
        for colour, (arm, seeds) in zip(itertools.cycle(_report.COLOURS), arms, strict=False):
            curves = [[before, *found["curve"]] for found in seeds]
            for curve in curves if len(curves) > 1 else []:
                ax.plot(*_points(curve, kind), color=colour, linewidth=0.6, alpha=0.5)
            x, y = zip(*(_mean(points, kind) for points in zip(*curves, strict=True)), strict=True)
            ax.plot(x, y, "o-", color=colour, label=arm, markersize=3)
            ax.plot(x[-1], y[-1], "D", color=colour, markersize=6)
        ax.invert_xaxis()
        ax.set_ylim(bottom=0)
        _report.label(ax, f"Drift {where}", "loss on held-out text (right: learned more)", "nats a token")
    axes[0, 0].legend(frameon=False, fontsize=8, title="diamonds: after training", title_fontsize=8)
    return figure


def _points(curve: Sequence[dict[str, float]], kind: str) -> tuple[list[float], list[float]]:
    return [point["held_out"] for point in curve], [point[kind] for point in curve]


def _mean(points: Sequence[dict[str, float]], kind: str) -> tuple[float, float]:
    held_out, drift = _points(points, kind)
    return statistics.mean(held_out), statistics.mean(drift)
