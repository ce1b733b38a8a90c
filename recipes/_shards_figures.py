"""``python -m optx.recipes._shards_figures``: the fused step on local shards of FSDP2, on gloo processes.

Every process has its shards of the same weights, gradients as `fully_shard` leaves them, and optimizers that
take turns, all processes at once: ours on the DTensors; ours on ordinary tensors that are the same shards
(unsharded: nothing is completed over the mesh); both again with ``metrics=True``; and, in every eighth round,
torch's operations on the DTensors (``fused=False``), which is how DTensors were stepped before kernels acted
on shards. A step's time is until the last process has taken it: no forward pass begins before. Printed are
ratios of minima and of medians; of the processes, the worst. Beside them stand those of the stepping thread's
CPU time, which hardly grows where other programs run.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import optx

from . import _bench
from ._bench_step import SHAPES
from ._options import positive
from ._report import Table, tell

PAIRS = {"shards": "unsharded", "shards, metered": "unsharded, metered"}
ARMS = (*PAIRS, *PAIRS.values())
TRANSFORMS: dict[str, Callable[[], list[optx.Transform]]] = {
    "AdamW": lambda: [],
    "PerpGrad": lambda: [optx.PerpGrad()],
    "PerpGrad, AdamR": lambda: [optx.PerpGrad(), optx.AdamR(weight=0.05)],
}


class _Squares(nn.Module):
    """A loss whose gradients are the weights themselves, through FSDP2's own hooks."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within = within

    def forward(self) -> Tensor:
        """The sum of squares."""
        return torch.stack([p.square().sum() for p in self.within.parameters()]).sum() / 2


def _optimizer(parameters: list[nn.Parameter], transforms: str, **settings: Any) -> Any:
    # A rate so small that the weights, which all arms share, stay as they are.
    base = torch.optim.AdamW(parameters, lr=1e-8, weight_decay=0.0)
    return optx.wrap(base, *TRANSFORMS[transforms](), **settings)


def _arms(shape: str, transforms: str) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = _Squares(SHAPES[shape][1]())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    fully_shard(model)
    model().backward()
    shards: list[Any] = list(model.parameters())
    plain: list[nn.Parameter] = []
    for p in shards:
        plain.append(nn.Parameter(p.detach().to_local()))
        plain[-1].grad = p.grad.to_local()
    return {
        "shards": _optimizer(shards, transforms, fused=True),
        "unsharded": _optimizer(plain, transforms, fused=True),
        "shards, metered": _optimizer(shards, transforms, fused=True, metrics=True),
        "unsharded, metered": _optimizer(plain, transforms, fused=True, metrics=True),
        "foreach": _optimizer(shards, transforms, fused=False),
    }


def _worker(rank: int, world: int, folder: str, shape: str, transforms: str, rounds: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    arms = _arms(shape, transforms)
    for arm in arms.values():
        arm.step()
        arm.step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    own: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)  # the same on all processes
    for number in range(rounds):
        names = ARMS if number % 8 else (*ARMS, "foreach")
        for name in order.sample(names, len(names)):
            dist.barrier()
            start, busy = time.perf_counter(), time.thread_time()
            arms[name].step()
            own[name].append(time.thread_time() - busy)
            dist.barrier()  # a forward pass gathers the others' weights first
            times[name].append(time.perf_counter() - start)
    all_of_them: list[Any] = [None] * world
    dist.all_gather_object(all_of_them, {"wall": times, "CPU": own})
    if rank == 0:
        torch.save(all_of_them, Path(folder, "times.pt"))
    dist.barrier()
    dist.destroy_process_group()


def measure(shape: str, transforms: str, world: int, rounds: int) -> dict[str, Any]:
    """Minima and medians of each process, in seconds, and the worst process's ratios."""
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, shape, transforms, rounds)
        mp.spawn(_worker, given, nprocs=world)  # type: ignore[no-untyped-call]
        measured: list[dict[str, Any]] = torch.load(Path(folder, "times.pt"), weights_only=True)
    found: dict[str, Any] = {"shape": shape, "transforms": transforms}
    found["threads"] = max(1, (os.cpu_count() or 1) // world)
    kinds = [("minima", "wall", min), ("medians", "wall", statistics.median)]
    kinds += [("CPU minima", "CPU", min), ("CPU medians", "CPU", statistics.median)]
    for kind, clock, of in kinds:
        each = [{name: of(values) for name, values in one[clock].items()} for one in measured]
        found[kind] = {
            "seconds": each,
            **{ours: max(one[ours] / one[plain] for one in each) for ours, plain in PAIRS.items()},
            "foreach": min(one["foreach"] / one["shards"] for one in each),
        }
    return found


def _table(found: list[dict[str, Any]]) -> Table:
    def ratio(one: dict[str, Any], clock: str, key: str) -> str:
        return f"{one[clock + 'minima'][key]:.3f} ({one[clock + 'medians'][key]:.3f})"

    rows = [
        (
            f"{SHAPES[one['shape']][0]}, {one['transforms']}",
            *(f"{1e3 * max(m[arm] for m in one['minima']['seconds']):.2f}" for arm in PAIRS),
            *(ratio(one, clock, key) for key in PAIRS for clock in ("", "CPU ")),
            ratio(one, "", "foreach"),
        )
        for one in found
    ]
    clocks = ("", ", CPU")
    kinds = (f"{name}{clock}" for name in ("to unsharded", "metered: to unsharded") for clock in clocks)
    headers = ("tensors, transforms", *(f"{arm}, ms" for arm in PAIRS), *kinds, "foreach to shards")
    threads = f"{found[0]['threads']} thread(s) a process"
    title = f"Steps of AdamW on FSDP2's local shards, {threads}: minima (medians)"
    return Table(headers, rows, title)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _bench.parser(
        "shards",
        __doc__,
        shapes={"nargs": "+", "choices": list(SHAPES), "default": ["big", "smollm2"]},
        transforms={"nargs": "+", "choices": list(TRANSFORMS), "default": list(TRANSFORMS)},
        processes={"type": positive, "default": 2},
        rounds={"type": positive, "default": 40},
    )
    options.prog = "python -m optx.recipes._shards_figures"
    args = _bench.parsed(options, arguments)
    found = [
        measure(shape, transforms, args.processes, args.rounds)
        for shape in args.shapes
        for transforms in args.transforms
    ]
    _bench.results(options, args, shards=found)
    tell([_table(found)])


if __name__ == "__main__":
    main()
