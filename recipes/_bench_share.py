"""``optx bench share``: what reading weights from a short array costs in time, and saves in memory.

Dense and shared networks take turns in one process, in blocks of calls. Memory is of the tensors that
training holds: weights, gradients and the optimizer's state (SGD with momentum, and Adam), each storage
once. The dense weights are kept in a file meanwhile. The floor is the array, its gradient and the state
alone.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _bench
from ._report import Table, console, tell
from ._run import device
from .share import network

CASES: dict[str, tuple[Callable[[], nn.Sequential], list[str], int, tuple[int, ...]]] = {
    "digits MLP": (network, ["0", "3", "6"], 64, (64, 256, 1024)),
    "Linear(1024, 1024)": (
        lambda: nn.Sequential(nn.Linear(1024, 1024).to(device())),
        ["0"],
        1024,
        (16, 64, 256),
    ),
}
WAYS = ("inference", "forward", "forward and backward")


def call(way: str, model: nn.Module, x: Tensor) -> None:
    """One of what is timed."""
    if way == "inference":
        with torch.no_grad():
            model(x)
    elif way == "forward":
        model(x)
    else:
        model(x).sum().backward()


def turns(calls: Sequence[Callable[[], None]], rounds: int, seconds: float) -> list[float]:
    """The median time of a call of each, in blocks that take turns."""
    for one in calls:
        one()
    start = time.perf_counter()
    calls[0]()
    block = max(1, int(seconds / (time.perf_counter() - start)))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for found, one in zip(times, calls, strict=True):
            start = time.perf_counter()
            for _ in range(block):
                one()
            found.append((time.perf_counter() - start) / block)
    return [statistics.median(found) for found in times]


def shared(case: str, compression: float, **options: Any) -> tuple[nn.Sequential, Any]:
    """A case's network, with its weights read from an array."""
    make, targets, _, _ = CASES[case]
    model = make()
    return model, optx.attach(model, optx.StableRPS(compression, **options), targets=targets)


def times(case: str, compression: float, rounds: int) -> list[dict[str, Any]]:
    """Shared over dense, by batch size and way."""
    make, _, width, sizes = CASES[case]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        x, dense, model = torch.randn(size, width, device=device()), make(), shared(case, compression)[0]
        row: dict[str, Any] = {"case": case, "batch": size}
        for way in WAYS:
            theirs, ours = turns([partial(call, way, one, x) for one in (dense, model)], rounds, 0.01)
            row[way] = ours / theirs
        rows.append(row)
    return rows


def moves(compression: float, rounds: int) -> dict[str, float]:
    """A gather and a sum of 2^20 weights over a copy of as many numbers."""
    from optx.kernels.shared import cpu
    from optx.kernels.shared.mapping import Place

    place = Place("fold", int(compression * 2**20), 0, 2**20, 0, 0.5)
    psi, values = torch.randn(place.slots), torch.randn(place.numel)
    calls = [
        values.clone,
        lambda: cpu.gather(psi, place, torch.float32),
        lambda: cpu.scatter(values, place, torch.float32),
    ]
    copy, gather, sums = turns(calls, rounds, 0.01)  # type: ignore[arg-type]
    return {"gather": gather / copy, "sums": sums / copy}


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of their storages."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def memory(case: str, compression: float, adam: bool) -> dict[str, Any]:
    """Bytes that training holds after a step, dense and shared, and the least that a shared one could."""

    def of(model: nn.Module, *more: Any) -> int:
        every = model.parameters()
        base = torch.optim.Adam(every) if adam else torch.optim.SGD(every, lr=0.01, momentum=0.9)
        optimizer: Any = optx.wrap(base, *more) if more else base
        model(torch.randn(4, CASES[case][2], device=device())).sum().backward()
        optimizer.step()
        state = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
        grads = [p.grad for p in model.parameters()]
        return held([*model.parameters(), *model.buffers(), *grads, *state])

    more = {"param_scale": "unit"} if adam else {}
    model, handle = shared(case, compression, keep="file", **more)
    ours = of(model, *([] if adam else [handle.grad_scale()]))
    floor = 4 * sum(p.numel() for p in model.parameters()) * (4 if adam else 3)
    dense = of(CASES[case][0]())
    return {
        "case": case,
        "optimizer": "Adam" if adam else "SGD",
        "dense": dense,
        "shared": ours,
        "floor": floor,
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """Times as ratios, and bytes."""
    settings, moved = results["settings"], results["moves"]
    rows = [
        (f"{one['case']}, batch {one['batch']}", *(f"{one[way]:.2f}" for way in WAYS))
        for one in results["times"]
    ]
    held_rows = [
        (
            f"{one['case']}, {one['optimizer']}",
            *(f"{one[kind] / 1e3:.1f} kB" for kind in ("dense", "shared", "floor")),
            *(f"{one[kind] / one['dense']:.3f}" for kind in ("shared", "floor")),
        )
        for one in results["memory"]
    ]
    return [
        Table(
            ("time over dense", *WAYS),
            rows,
            f"Shared at {settings['compression']:g} numbers per weight, {settings['rounds']} rounds",
            f"Medians. Of 2^20 weights a gather takes {moved['gather']:.2f} and the gradient's sums "
            f"{moved['sums']:.2f} of the time in which as many float32 numbers are copied.",
        ),
        Table(
            ("weights, gradients, state", "dense", "shared", "floor", "of dense", "floor"),
            held_rows,
            "Memory that training holds",
            "The scaler of SGD is one more number per slot, which the floor leaves out. The backward pass "
            "makes one layer's dense gradient for a moment besides.",
        ),
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "share",
        __doc__,
        compression={"type": float, "default": 0.1},
        rounds={"type": int, "default": 15},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench share --help``."""
    args = _bench.parsed(options(), arguments)
    found = _bench.results(
        options(),
        args,
        times=[row for case in CASES for row in times(case, args.compression, args.rounds)],
        moves=moves(args.compression, args.rounds),
        memory=[memory(case, args.compression, adam) for case in CASES for adam in (False, True)],
    )
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
