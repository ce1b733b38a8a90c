"""Moments of 8 bits over shards that differ in size, and through torch's distributed checkpoint."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from processes import FOLDER, on_processes
from torch import nn

import optx


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 8))


def wrapped(model: nn.Module) -> optx.Wrapped:
    return optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), state="8bit", fused=True)


def sharded() -> tuple[nn.Module, optx.Wrapped]:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model)
    return model, wrapped(model)


def train(model: nn.Module, opt: optx.Wrapped, steps: int) -> None:
    for step in range(steps):
        opt.zero_grad()
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        opt.step()


def here(t: Any) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def shards_resume(rank: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    folder = Path(os.environ[FOLDER]) / "formats"
    model, opt = sharded()
    train(model, opt, 3)
    first = model[0].weight
    assert opt.state[first]["exp_avg"].to_local().dtype == torch.int8
    assert opt.state[first]["optx.scale.exp_avg"].shape == (33, 2)
    assert opt.state[model[2].weight]["exp_avg"].to_local().dtype == torch.float32  # rows of 33
    saved = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    dcp.save(saved, checkpoint_id=folder)
    again, other = sharded()
    loaded = {"model": again.state_dict(), "opt": get_optimizer_state_dict(again, other)}
    dcp.load(loaded, checkpoint_id=folder)
    again.load_state_dict(loaded["model"])
    set_optimizer_state_dict(again, other, loaded["opt"])
    train(model, opt, 2)
    train(again, other, 2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(here(p), here(q))
        assert all(torch.equal(here(t), here(other.state[q][k])) for k, t in opt.state[p].items())


def one_process_is_resumed_by_shards(rank: int) -> None:
    """Where a whole weight has codes and a sharded one has not: of rows of 33, and of biases."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True)
    alone = network()
    opt = wrapped(alone)
    train(alone, opt, 3)
    whole, moments = dcp.get_state_dict(alone, opt, options=options)
    assert opt.state[alone[0].bias]["exp_avg"].dtype == torch.int8
    model, other = sharded()
    dcp.set_state_dict(
        model,
        other,
        model_state_dict=copy.deepcopy(whole),
        optim_state_dict=copy.deepcopy(moments),
        options=options,
    )
    train(alone, opt, 1)
    train(model, other, 1)
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.full_tensor().detach(), rtol=0, atol=1e-6)
    assert other.state[model[0].bias]["exp_avg"].to_local().dtype == torch.float32


test_shards = on_processes(2, shards_resume, one_process_is_resumed_by_shards)
