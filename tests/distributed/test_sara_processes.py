"""SaRA on two processes: DDP in both forms, FSDP2, and the same matrix for the nuclear norm on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn

import optx


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 4))


def sara(**options: Any) -> optx.SaRA:
    return optx.SaRA(fraction=0.2, reselect_at=3, rank_weight=0.01, **options)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)


def batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def alone() -> tuple[nn.Module, Any]:
    """One process on both ranks' samples."""
    net = model()
    opt = optx.wrap(adamw(net), sara())
    for step in range(6):
        opt.zero_grad()
        net(batch(step)).square().mean().backward()
        opt.step()
    return net, opt


def train(net: nn.Module, opt: Any, rank: int) -> None:
    for step in range(6):
        opt.zero_grad()
        net(batch(step).chunk(2)[rank]).square().mean().backward()
        opt.step()


def under_ddp(rank: int, compact: bool) -> None:
    wanted, _ = alone()
    net = model()
    ddp = nn.parallel.DistributedDataParallel(net)
    opt = optx.wrap(adamw(ddp), sara(compact=compact))
    train(ddp, opt, rank)
    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), name
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both), name
        if compact:
            assert opt.state[p]["exp_avg"].ndim == 1


def ddp_dense(rank: int) -> None:
    under_ddp(rank, compact=False)


def ddp_compact(rank: int) -> None:
    under_ddp(rank, compact=True)


def fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    wanted, known = alone()
    start = {name: p.detach().clone() for name, p in model().named_parameters()}
    net = model()
    fully_shard(net)
    opt = optx.wrap(adamw(net), sara())
    assert opt.sara.density(net).selected > known.sara.density(wanted).selected  # before the re-selection
    train(net, opt, rank)
    assert opt.sara.threshold == known.sara.threshold
    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        full = p.full_tensor()  # type: ignore[attr-defined]
        assert torch.allclose(full, q, atol=2e-5), name
        still = start[name].abs() >= opt.sara.threshold
        assert torch.equal(full[still], start[name][still]), name
    table = opt.sara.density(net)
    assert abs(table.selected - known.sara.density(wanted).selected) <= 2
    delta: Any = opt.sara.delta(model(), net).apply(model())
    assert all(torch.equal(delta[n], p.full_tensor()) for n, p in net.named_parameters())  # type: ignore[attr-defined]
    with pytest.raises(optx.TransformError, match="compact=True does not serve sharded weights"):
        optx.wrap(adamw(net), sara(compact=True))


test_on_two_processes = on_processes(2, ddp_dense, ddp_compact, fsdp)
