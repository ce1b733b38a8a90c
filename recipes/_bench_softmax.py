"""``optx bench softmax``: rows of 2^14 to 2^25 in two passes, in three, and by torch.

Two passes are `optx.functional.softmax2`'s way with long rows; those of 2^16 or fewer it reads where they
are, in a core's cache, as reload does. The two ways of three passes are written as it is (vectors,
exponentials, pieces of a row, threads, results past the caches): recompute reads a row for its largest entry,
for the sum and for the result, reload keeps the exponentials of the second pass in the result. Results go to
memory that is there already. All take turns, each after a call of its own that does not count.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx.kernels.softmax import cpu

from . import _bench
from ._options import positive
from ._report import Table, console, tell
from ._softmax_three import softmax as three

LEAST = 1 << 16  # elements of shorter rows together
BYTES = {"two passes": 12, "recompute": 16, "reload": 20}  # of an element, as each way reads and writes it
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "two passes": lambda x, y: cpu.softmax(x, y, short=0),
    "recompute": lambda x, y: three(x, y, reloads=False),
    "reload": lambda x, y: three(x, y, reloads=True),
    "softmax2": lambda x, y: cpu.softmax(x, y),
    "torch": lambda x, y: torch.softmax(x, -1, out=y),
}


def seconds(way: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor) -> float:
    """Of a call, from so many that a clock tells something; the first one is not among them."""
    started = time.perf_counter()
    way(x, y)
    times = max(1, round(0.003 / (time.perf_counter() - started)))
    started = time.perf_counter()
    for _ in range(times):
        way(x, y)
    return (time.perf_counter() - started) / times


def length(power: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a call of each way with rows of ``2**power``, and how many such rows a call has."""
    n = 1 << power
    rows = max(1, LEAST // n)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(power)) * 10
    y = torch.zeros_like(x)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            found[name].append(seconds(way, x, y))
    medians = {name: statistics.median(some) for name, some in found.items()}
    return {"power": power, "rows": rows, "seconds": medians}


def errors(numbers: int) -> dict[str, float]:
    """Largest errors against float64, as shares of the largest result, on a row from U(-1000, 1000)."""
    x = 2000 * torch.rand(1, numbers, generator=torch.Generator().manual_seed(0)) - 1000
    exact, y = torch.softmax(x.double(), -1), torch.empty_like(x)
    found: dict[str, float] = {}
    for name, way in WAYS.items():
        way(x, y)
        found[name] = float((y - exact).abs().max() / exact.max())
    return found


def tables(results: dict[str, Any]) -> list[Table]:
    """Times beside two passes, by length."""
    rows: list[Sequence[str]] = []
    for one in results["lengths"]:
        taken, elements = one["seconds"], one["rows"] << one["power"]
        base = taken["two passes"]
        rows.append(
            (
                f"2^{one['power']}",
                f"{elements * 8 / 2**20:g}",
                f"{base * 1e6:.0f}",
                f"{BYTES['two passes'] * elements / base / 1e9:.1f}",
                *(f"{taken[name] / base:.2f}" for name in WAYS if name != "two passes"),
            )
        )
    told = ", ".join(f"{name} {error:.1e}" for name, error in results["errors"].items())
    return [
        Table(
            (
                "row",
                "MiB in and out",
                "two passes, µs",
                "GB/s",
                *(name for name in WAYS if name != "two passes"),
            ),
            rows,
            "Softmax of float32 rows: time over that of two passes",
            f"GB/s of two reads and a write. Shorter rows are several in a call, {LEAST} numbers together; "
            "torch gives each row to one thread. Largest error on a row of "
            f"{results['settings']['numbers']} numbers from -1000 to 1000, as a share of the largest result: "
            f"{told}.",
        ),
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "softmax",
        __doc__,
        least={"type": positive, "default": 14, "help": "the shortest row's power of two"},
        most={"type": positive, "default": 25, "help": "the longest one's"},
        numbers={"type": positive, "default": 1_000_003, "help": "in the row that errors are of"},
        rounds={"type": positive, "default": 9},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench softmax --help``."""
    args = _bench.parsed(options(), arguments)
    found = _bench.results(
        options(),
        args,
        lengths=[length(power, args.rounds) for power in range(args.least, args.most + 1)],
        errors=errors(args.numbers),
    )
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
