"""What ``optx bench hft`` shows, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ._report import Table

PARTS = ("forward", "backward", "step")


def tables(results: dict[str, Any]) -> list[Table]:
    """What is counted, what is timed, and where the time goes."""
    made = [_counted(results), _timed(results)]
    if results["subjects"][0]["kinds"]:
        made += [_profiled(results), _others(results, 8)]
    return made


def _counted(results: dict[str, Any]) -> Table:
    """What torch computed, beside what it must."""
    adamw, hft = results["work"]
    inputs = adamw["backward"] - adamw["weight_gradients"]
    must = inputs + hft["weight_gradients"]
    rows = [
        ("forward, GFLOP", adamw["forward"], hft["forward"], adamw["forward"], 1e9),
        ("backward, GFLOP", adamw["backward"], hft["backward"], must, 1e9),
        ("of it inputs' gradients", inputs, hft["backward"] - hft["weight_gradients"], inputs, 1e9),
        ("of it weights' gradients", *_both(results, "weight_gradients"), hft["weight_gradients"], 1e9),
        (
            "forward and backward, GFLOP",
            *(work["forward"] + work["backward"] for work in results["work"]),
            adamw["forward"] + must,
            1e9,
        ),
        ("gradients, MB", *_both(results, "gradient_bytes"), hft["gradient_bytes"], 1e6),
        ("optimizer state, MB", *_both(results, "state_bytes"), hft["state_bytes"], 1e6),
        ("moved by the optimizer, MB", *_both(results, "step_bytes"), hft["step_bytes"], 1e6),
    ]
    products = " and ".join(
        f"{subject['products']} weight gradients for {work['matrices']} trained matrices"
        for subject, work in zip(results["subjects"], results["work"], strict=True)
    )
    return Table(
        ("", "AdamW", "AdamW + HFT", "ratio", "floor"),
        [
            (name, f"{a / unit:,.1f}", f"{h / unit:,.1f}", f"{h / a:.3f}", f"{least / a:.3f}")
            for name, a, h, least, unit in rows
        ],
        "Counted, one step",
        f"Floor: what must be computed, given this half. The profiler saw {products}.",
    )


def _both(results: dict[str, Any], key: str) -> tuple[int, int]:
    adamw, hft = results["work"]
    return adamw[key], hft[key]


def _timed(results: dict[str, Any]) -> Table:
    """The parts of a step without the profiler."""
    subjects, floor = results["subjects"], results["floor"]
    rows: list[Sequence[str]] = []
    for name, parts in {**{part: (part,) for part in PARTS}, "all": PARTS}.items():
        least = [sum(min(s["times"][part]) for part in parts) for s in subjects]
        middle = [sum(statistics.median(s["times"][part]) for part in parts) for s in subjects]
        times = (f"{1e3 * a:,.0f} (+{b / a - 1:.0%})" for a, b in zip(least, middle, strict=True))
        touched = (sum(statistics.median(s["touched"][part]) for part in parts) for s in subjects)
        pages = " / ".join(f"{number / 1e6:,.0f}" for number in touched)
        ratios = (f"{hft / adamw:.3f}" for adamw, hft in (least, middle))
        rows.append((name, *times, *ratios, f"{floor[name]:.3f}", pages))
    return Table(
        ("", "AdamW, ms", "AdamW + HFT, ms", "ratio", "of medians", "floor", "new pages, MB"),
        rows,
        "Timed",
        "Minimum over the rounds; in brackets, how far the median is above it. Floor: AdamW's time without "
        "the weight gradients of frozen matrices, and without the optimizer's bytes for them. New pages: "
        "memory that is touched for the first time, AdamW and HFT.",
    )


def _profiled(results: dict[str, Any]) -> Table:
    """Where the time goes."""
    adamw, hft = (subject["kinds"] for subject in results["subjects"])
    floors = {
        "backward: weight gradients": results["floor"]["weight gradients"],
        "step: all": results["floor"]["step"],
    }
    whole = sum(adamw.values())
    kinds = sorted(adamw | hft, key=lambda kind: (PARTS.index(kind.partition(":")[0]), -adamw.get(kind, 0)))
    rows: list[Sequence[str]] = []
    for kind in kinds:
        a, h = adamw.get(kind, 0.0), hft.get(kind, 0.0)
        ratio = f"{h / a:.3f}" if a else ""
        times = (f"{1e3 * a:,.1f}", f"{a / whole:.1%}", f"{1e3 * h:,.1f}")
        rows.append((kind, *times, ratio, f"{floors.get(kind, 1.0):.3f}"))
    return Table(
        ("", "AdamW, ms", "share", "AdamW + HFT, ms", "ratio", "floor"),
        rows,
        "Under the profiler",
        "Each operation's own time, its minimum over the rounds.",
    )


def _others(results: dict[str, Any], number: int) -> Table:
    """The longest operations of the backward that are no matrix product."""
    adamw, hft = (subject["others"] for subject in results["subjects"])
    rows: list[Sequence[str]] = []
    for name in sorted(adamw, key=lambda name: -adamw[name][0])[:number]:
        calls = (found.get(name, (0.0, 0)) for found in (adamw, hft))
        rows.append((name, *(cell for seconds, n in calls for cell in (f"{1e3 * seconds:.1f}", str(n)))))
    return Table(
        ("", "AdamW, ms", "calls", "AdamW + HFT, ms", "calls"),
        rows,
        "Other parts of the backward",
        "The longest.",
    )
