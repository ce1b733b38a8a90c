"""Recipes of several parts, each a module: which are run, and their tables and picture.

A part has ``ARMS``, ``OPTIONS``, ``prepared(args)``, ``train``, ``tables(results)`` and ``draw``, a ``TITLE``
and ``AXES`` for its picture, and ``ONCE``: whether one seed has samples enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _report
from ._report import Table, by_seed
from ._run import Run, chosen

Parts = Mapping[str, Any]


def options(parts: Parts) -> dict[str, dict[str, Any]]:
    """Those of all parts."""
    return {name: keywords for part in parts.values() for name, keywords in part.OPTIONS.items()}


def wanted(parts: Parts, names: str) -> list[Any]:
    """Those that ``--parts`` names."""
    found = chosen(names, parts, "--parts")
    return [part for name, part in parts.items() if name in found]


def run_all(run: Run, parts: Sequence[Any], args: Any) -> None:
    """Run all arms of these parts, with all seeds, but for what is finished."""
    for part in parts:
        seeds = range(args.seed, args.seed + (1 if part.ONCE else args.seeds))
        todo = [(arm, seed) for seed in seeds for arm in part.ARMS if not run.finished(f"{arm}/{seed}")]
        known = part.prepared(args) if todo else None
        for arm, seed in todo:
            run.part(f"{arm}/{seed}", part.train, arm, seed, known, args, run)


def tables(parts: Parts, results: dict[str, Any]) -> list[Table]:
    """Of the parts that were run."""
    return [table for part in _there(parts, results) for table in part.tables(results)]


def report(parts: Parts, run: Run, picture: str) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(parts, run.results))
    drawn = _there(parts, run.results)
    figure, axes = _report.canvas(len(drawn))
    for ax, part in zip(axes[0], drawn, strict=True):
        part.draw(ax, run.results)
        _report.label(ax, part.TITLE, *part.AXES)
    _report.save(figure, run.folder / picture)


def _there(parts: Parts, results: dict[str, Any]) -> list[Any]:
    run = set(by_seed(results["arms"]))
    return [part for part in parts.values() if run & set(part.ARMS)]
