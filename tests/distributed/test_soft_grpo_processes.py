"""SofT-GRPO over two gloo processes under DDP, each with groups of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import nn

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")
REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0.5, 0])


def model() -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 30)).double()
    made[0].requires_grad_(False)  # DDP waits for every gradient, and inputs give the embedding none
    return made


def rolled(net: nn.Module) -> optx.Rollout:
    with optx.attach(net, optx.SoftThinking(record=True, tau=0.1, top_k=5, max_topk=5)) as thinking:
        return thinking.rollout(torch.tensor([[3], [4]]), 4, max_new_tokens=5, seed=0, stop_ids=())


def groups_are_split_by_rank(rank: int) -> None:
    """Two updates of a rollout: gradients are the whole batch's, as all rows are equally long."""
    alone, net = model(), model()
    whole, own = rolled(alone), rolled(net)
    shared = nn.parallel.DistributedDataParallel(net)
    rows = slice(4 * rank, 4 * rank + 4)
    one, other = optx.SofTGRPO(kl=0.0), optx.SofTGRPO(kl=0.0)
    known = other.record(shared, own).rows(rows)
    for _ in range(2):
        for module, loss in (
            (alone, one(alone, whole, REWARDS)),
            (net, other(shared, known, REWARDS[rows])),
        ):
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p -= 0.5 * p.grad
        for p, q in zip(alone.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert other.report()["ratio_max"] > 1


test_groups_are_split_by_rank = on_processes(2, groups_are_split_by_rank)
