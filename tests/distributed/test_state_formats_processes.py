"""Moments of 8 bits over shards that differ in size, and through torch's distributed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from processes import FOLDER, on_processes
from torch import nn

import optx


def sharded() -> tuple[nn.Module, optx.Wrapped]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 8))
    fully_shard(model)
    return model, optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), state="8bit", fused=True)


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


test_shards = on_processes(2, shards_resume)
