"""``optx bench merge``: time of merging three models in memory, beside mergekit's.

Random bfloat16 weights; the sums of both libraries are float32. Both run in one process and take turns.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import optx

from . import _bench
from ._report import Table, console, tell

MODELS = 3
COLUMNS = 1024
Weights = dict[str, Tensor]

# optx's method, under mergekit's conventions where it has it, and mergekit's name and parameters for it.
METHODS: dict[str, tuple[optx.MergeMethod, tuple[str, dict[str, float]] | None]] = {
    "task arithmetic": (optx.TaskArithmetic(weights=0.3), ("task_arithmetic", {"weight": 0.3})),
    "TIES": (optx.TIES(density=0.2, convention="mergekit"), ("ties", {"density": 0.2, "weight": 1.0})),
    "DARE": (optx.DARELinear(p=0.9, convention="mergekit"), ("dare_linear", {"density": 0.1, "weight": 1.0})),
    "DARE-TIES": (
        optx.DARETIES(p=0.9, convention="mergekit"),
        ("dare_ties", {"density": 0.1, "weight": 1.0}),
    ),
    "TIES, whole model": (optx.TIES(density=0.2), None),
    "PCB, whole model": (optx.PCB(ratio=0.1), None),
}


def models(tensors: int, rows: int) -> tuple[Weights, list[Weights]]:
    """A base and fine-tunings of it, with so many matrices of (rows, COLUMNS)."""
    draws = torch.Generator().manual_seed(0)
    names = [f"layer{i}.weight" for i in range(tensors)]
    base = {name: torch.randn(rows, COLUMNS, generator=draws).bfloat16() for name in names}

    def tuned() -> Weights:
        return {n: (t + 0.01 * torch.randn(t.shape, generator=draws)).bfloat16() for n, t in base.items()}

    return base, [tuned() for _ in range(MODELS)]


def subjects(base: Weights, tuned: list[Weights]) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is timed, by method and library."""
    from mergekit.merge_methods import merge_state_dicts

    wide: dict[str, Any] = {"base": 0, "dtype": torch.float32, "out_dtype": torch.bfloat16}
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (ours, theirs) in METHODS.items():
        found[name, "optx"] = lambda ours=ours: optx.merge(base, tuned, ours)
        if theirs is not None:
            method, options = theirs
            found[name, "mergekit"] = lambda method=method, options=options: merge_state_dicts(
                [base, *tuned], method, parameters=options, **wide
            )
    return found


def measure(base: Weights, tuned: list[Weights], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each subject, after a first time that does not count."""
    timed = subjects(base, tuned)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for number in range(rounds + 1):
        for key, merged in timed.items():
            started = time.perf_counter()
            merged()
            if number:
                seconds[key].append(time.perf_counter() - started)
    return {key: statistics.median(found) for key, found in seconds.items()}


def tables(results: dict[str, Any]) -> list[Table]:
    """Time per number, and as a share of mergekit's."""
    settings, seconds = results["settings"], results["seconds"]
    size = settings["tensors"] * settings["rows"] * COLUMNS
    rows: list[Sequence[str]] = []
    for name, found in seconds.items():
        ours, theirs = found["optx"], found.get("mergekit")
        cells = [f"{theirs / size / MODELS * 1e9:.1f}", f"{ours / theirs:.2f}"] if theirs else ["", ""]
        rows.append((name, f"{ours / size / MODELS * 1e9:.1f}", *cells))
    return [
        Table(
            ("", "optx: ns per number of a tuned model", "mergekit", "optx / mergekit"),
            rows,
            f"Merging {MODELS} models of {size / 1e6:.1f} million numbers each, in memory",
            f"Medians of {settings['rounds']} rounds, under mergekit's conventions where it has the method.",
        )
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "merge",
        __doc__,
        tensors={"type": int, "default": 8, "help": "matrices of a model"},
        rows={"type": int, "default": 2048, "help": f"of each matrix; columns are {COLUMNS}"},
        rounds={"type": int, "default": 3},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench merge --help``."""
    args = _bench.parsed(options(), arguments)
    seconds: dict[str, dict[str, float]] = {}
    for (method, library), median in measure(*models(args.tensors, args.rows), args.rounds).items():
        seconds.setdefault(method, {})[library] = median
    found = _bench.results(options(), args, seconds=seconds)
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
