"""MuAdamW over two gloo processes: shards have the whole's shapes; a checkpoint is not multiplied again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import nn
from torch.optim import lr_scheduler

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")
LR, DECAY = 3e-3, 0.1
BATCH = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def net(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (12, width), (width, width), (width, 5)
    return nn.Sequential(*(nn.Linear(*size) for size in sizes))


def begin(model: nn.Module, shapes: Any) -> tuple[Any, Any]:
    opt = torch.optim.AdamW(model.named_parameters(), lr=LR, weight_decay=DECAY)
    opt = optx.wrap(opt, optx.MuAdamW(shapes), optx.PerpGrad(), fused=False)  # by kernels: in tests/engines
    return opt, lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))


def train(model: nn.Module, opt: Any, schedule: Any, batch: torch.Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(batch).square().mean().backward()
        opt.step()
        schedule.step()


def shards_train_as_the_whole_does(rank: int) -> None:
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    whole, model = net(), net()
    shapes = optx.scaling.shapes(model, base=net(8))
    fully_shard(model)
    opt, schedule = begin(model, shapes)
    assert [g["lr"] for g in opt.param_groups] == [LR, LR / 3, LR]
    train(model, opt, schedule, BATCH[rank::2])
    alone, rates = begin(whole, shapes)
    train(whole, alone, rates, BATCH)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]

    saved = dcp.get_optimizer_state_dict(model, opt)
    weights = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    again = net()
    fully_shard(again)
    fresh, _ = begin(again, optx.scaling.shapes(net(), base=net(8)))
    dcp.set_optimizer_state_dict(again, fresh, saved)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in opt.param_groups]
    assert [g["optx.mu.lr"] for g in fresh.param_groups] == [1.0, 1 / 3, 1.0]
    for name, p in again.named_parameters():
        assert torch.equal(p.full_tensor(), dict(net().named_parameters())[name])  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(weights[name], p.device_mesh, p.placements))
    train(again, fresh, schedule, BATCH[rank::2], 1)


def first_weights_of_shards(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    whole, model = net(), net()
    shapes = optx.scaling.shapes(model, base=net(8))
    fully_shard(model)
    optx.scaling.init_(model, shapes)
    optx.scaling.init_(whole, shapes)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)  # type: ignore[attr-defined]


def under_ddp_names_are_found(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    shapes = optx.scaling.shapes(model, base=net(8))
    opt, schedule = begin(model, shapes)
    train(model, opt, schedule, BATCH[rank::2])
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([LR / 4, LR / 12, LR / 4])


test_on_two_processes = on_processes(
    2, shards_train_as_the_whole_does, first_weights_of_shards, under_ddp_names_are_found
)
