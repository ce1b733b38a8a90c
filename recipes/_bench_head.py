"""``optx bench head``: a step of an output head by its number of classes, in factors and dense.

Loss, gradients and the head's step of plain SGD, for a batch of inputs: `optx.SphericalHead` under the
Z-loss, an nn.Linear under the same loss, and an nn.Linear under cross-entropy. All take turns; dense heads up
to ``--dense`` classes. Upkeep that comes every so many steps (bringing singular values back, W^T W anew) is
not in the median; told beside it is what it adds to a step in the mean.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx

from . import _bench
from ._options import positive
from ._report import Table, console, tell
from ._run import clock, device

DENSE = {"dense, Z-loss": optx.ZLoss(), "dense, cross-entropy": F.cross_entropy}
FACTORED = "SphericalHead"


def factored(x: Tensor, y: Tensor, classes: int) -> tuple[Callable[[], None], Any]:
    """A step of the head in factors, and its handle."""
    model = nn.Sequential(nn.Linear(x.shape[1], classes, bias=False, device=x.device))
    handle = optx.attach(model, optx.SphericalHead(), targets="0")

    def step() -> None:
        handle.loss(x, y).backward()
        handle.step()

    return step, handle


def dense(x: Tensor, y: Tensor, classes: int, loss: Callable[..., Tensor]) -> Callable[[], None]:
    """A step of the plain head."""
    model = nn.Linear(x.shape[1], classes, bias=False, device=x.device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        loss(model(x), y).backward()
        sgd.step()
        sgd.zero_grad()

    return step


def medians(ways: dict[str, Callable[[], None]], rounds: int, block: int = 1) -> dict[str, float]:
    """Seconds of a step of each, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, one in ways.items():
            for _ in range(block):
                before = clock()
                one()
                found[name] += [clock() - before] * (turn > 0)  # the first ones find caches cold
    return {name: statistics.median(some) for name, some in found.items()}


def measured(counts: Sequence[int], args: Any) -> list[dict[str, Any]]:
    """By classes, median seconds of a step of each way: the heads in factors among each other first."""
    batches, heads = {}, {}
    for count in counts:
        draws = torch.Generator().manual_seed(count)
        x = torch.randn(args.batch, args.width, generator=draws).to(device()).requires_grad_()
        batches[count] = x, torch.randint(count, (args.batch,), generator=draws).to(device())
        heads[count] = factored(*batches[count], count)
    steps = medians({str(count): step for count, (step, _) in heads.items()}, args.rounds, 10)
    rows: list[dict[str, Any]] = []
    for count, (step, handle) in heads.items():
        row = {"classes": count, "step": steps[str(count)], "upkeep": upkeep(handle), "beside": {}}
        if count <= args.dense:
            ways = {name: dense(*batches[count], count, loss) for name, loss in DENSE.items()}
            row["beside"] = medians({FACTORED: step, **ways}, args.rounds)
        rows.append(row)
    return rows


def upkeep(handle: Any) -> float:
    """Seconds of what comes every so many steps, for each of these."""
    factors, injection = handle.served[0].part.factors, handle.injection
    start = time.perf_counter()
    factors.stabilise()
    between = time.perf_counter()
    factors.recompute()
    done = time.perf_counter()
    return (between - start) / injection.stabilize_every + (done - between) / injection.recompute_every


def tables(results: dict[str, Any]) -> list[Table]:
    """Ratios: to the step with the fewest classes, and of the dense ones to it."""
    settings, every = results["settings"], results["classes"]
    rows: list[Sequence[str]] = []
    for one in every:
        beside = one["beside"]
        ratios = [f"{beside[name] / beside[FACTORED]:.1f}" if beside else "-" for name in DENSE]
        own = (f"{one['step'] / every[0]['step']:.2f}", f"{one['upkeep'] / one['step']:.3f}")
        rows.append((f"{one['classes']:,}", *own, *ratios))
    return [
        Table(
            ("classes", "step, to the first", "upkeep", *DENSE),
            rows,
            f"Heads of width {settings['width']}, batches of {settings['batch']}",
            "Medians. Step, to the first: of the head in factors, as a ratio to the one with the fewest "
            "classes. Upkeep: what comes every so many steps, as a share of a step. Dense: as ratios to the "
            "head in factors.",
        )
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "head",
        __doc__,
        width={"type": positive, "default": 64, "help": "of the head's input"},
        batch={"type": positive, "default": 64},
        most={"type": positive, "default": 1_000_000, "help": "classes, by tens from 10,000"},
        dense={"type": positive, "default": 100_000, "help": "the most classes of dense heads"},
        rounds={"type": positive, "default": 9},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench head --help``."""
    args = _bench.parsed(options(), arguments)
    counts = [count for count in (10_000, 100_000, 1_000_000, 10_000_000) if count <= max(args.most, 10_000)]
    found = _bench.results(options(), args, classes=measured(counts, args))
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
