"""ABMLL over two gloo processes, each with tasks of its own: as one process that takes them in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from abmll_models import equal, meta, mlp
from processes import on_processes
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")


def steps(rank: int | None, how: str) -> dict[str, Tensor]:
    """Three meta-steps of four tasks, with draws; on one process, or two of each on one of two."""
    model, ab = mlp(beta=1e-3)
    call: Any = nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
    opt = torch.optim.Adam(ab.parameters(), lr=0.05)
    for step in range(3):
        numbers = [4 * step + i for i in range(4)]
        if how != "ddp":
            meta(model, ab, numbers if rank is None else numbers[rank::2])
        else:
            mine = numbers[rank::2]
            with call.no_sync():
                meta(model, ab, mine[:1], query=call, tasks=2)
            meta(model, ab, mine[1:], query=call, tasks=2)
        if how == "hand":
            for p in ab.parameters():
                dist.all_reduce(p.grad)
                p.grad /= 2
        opt.step()
        opt.zero_grad()
    return ab.state_dict()


def same(rank: int, how: str) -> None:
    found = steps(rank, how)
    group = dist.group.WORLD
    dist.distributed_c10d._update_default_pg(None)  # alone for the time of it
    try:
        wanted = steps(None, "alone")
    finally:
        dist.distributed_c10d._update_default_pg(group)
    assert found.keys() == wanted.keys()
    assert int(found["optx.abmll.tasks"]) == int(wanted["optx.abmll.tasks"]) == 12
    for key, t in wanted.items():
        torch.testing.assert_close(found[key], t, msg=key)
    assert not equal(found, mlp(beta=1e-3)[1].state_dict())


def by_hand(rank: int) -> None:
    same(rank, "hand")


def ddp(rank: int) -> None:
    same(rank, "ddp")


test_two_processes_are_one_that_takes_their_tasks_in_turn = on_processes(2, by_hand, ddp)
