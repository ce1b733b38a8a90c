"""Runs cases on two gloo processes, or more: one start of them for a module, one import for all modules."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[int], None]

# What a process would spend most of its time on, and with it what torch imports at first use: the server that
# processes are forked from, one for each worker of pytest, has it.
IMPORTED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "optx", "pytest")


def on_two_processes(cases: Sequence[Case]) -> None:
    """Call each case, a function of a test's module, with its rank on both; raise unless all came through.

    To be called once a module: two workers of pytest would start the processes twice.
    """
    on_processes(cases, 2)


def on_processes(cases: Sequence[Case], world: int, start: str = "forkserver") -> None:
    """The same on so many; with ``start="fork"`` they are forked from this process, with what it imported."""
    if start == "forkserver":
        mp.get_context(start).set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "said").mkdir()
        given = (cases, world, folder, dict(os.environ))  # the server's own is that of its start
        try:
            mp.start_processes(_worker, given, nprocs=world, start_method=start)  # type: ignore[no-untyped-call]
        except mp.ProcessRaisedException as error:
            print(error)
        said = {path.name: path.read_text() for path in Path(folder, "said").iterdir()}
    wanted = {f"{case.__name__}.{rank}": "passed" for case in cases for rank in range(world)}
    assert {name: said.get(name, "not reached") for name in wanted} == wanted


def _worker(
    rank: int, cases: Sequence[Case], world: int, folder: str, environment: Mapping[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(minutes=3)
    )
    said = Path(folder, "said")
    for case in cases:
        try:
            case(rank)
        except Exception as error:
            (said / f"{case.__name__}.{rank}").write_text(repr(error))
            raise
        (said / f"{case.__name__}.{rank}").write_text("passed")
        dist.barrier()
    dist.destroy_process_group()
