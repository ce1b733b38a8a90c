"""What the results page says of ``optx audit``, from the rows that it writes."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from optx.kernels.audit import report

from ._report import Table


def options() -> ArgumentParser:
    """The audit's command line."""
    return report.options()


def tables(results: dict[str, Any]) -> list[Table]:
    """What each program's bytes take on each device, and what was compiled for what."""
    rows = results["rows"]
    targets = ", ".join(dict.fromkeys(row["target"] for row in rows))
    problems = sum(len(row["problems"]) for row in rows)
    spills = sum(row["machine"]["spills"] > 0 for row in rows)
    narrow = min(width for row in rows if row["implied"] for width in (*row["loads"], *row["stores"]))
    return [
        Table(
            *report.floors(results["traffic"]),
            report.FLOORS,
            f"{len(rows)} kernels compiled for {targets}: {problems} problems. {spills} of them spill; the "
            f"narrowest access in a main loop has {narrow} bits.",
        )
    ]
