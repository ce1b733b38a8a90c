"""Two gloo processes under FSDP2: a whole checkpoint for one, a step that all skip; and DCP in one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # 7 and 3 rows shard unevenly


def sharded() -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for part in (model[0], model[2], model):
        fully_shard(part)
    return model


def wrapped(model: nn.Module, *transforms: optx.Transform) -> optx.Wrapped:
    chosen = transforms or (optx.PerpGrad(), optx.AdamR(weight=0.05))
    return optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0), *chosen)


def data(step: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        opt.zero_grad()
        ((step + 1) * model(data(step)[part])).square().mean().backward()
        opt.step()


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def full_checkpoint_loads_into_one_process(rank: int) -> None:
    model = sharded()
    opt = wrapped(model)
    train(model, opt, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))  # it shares step counts
    weights = [whole(p).detach().clone() for p in model.parameters()]
    train(model, opt, range(3, 5))
    if rank == 0:
        assert full["state"]["0.weight"]["optx.adamr.anchor"].shape == (7, 5)
        single = net()
        with torch.no_grad():
            for p, w in zip(single.parameters(), weights, strict=True):
                p.copy_(w)
        resumed = wrapped(single)
        set_optimizer_state_dict(single, resumed, full)
        assert torch.equal(resumed.state[single[0].weight]["optx.adamr.anchor"], net()[0].weight)
    weights = [whole(p).detach() for p in model.parameters()]  # all ranks take part
    if rank == 0:
        train(single, resumed, range(3, 5))
        for p, w in zip(single.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-6)


def all_ranks_skip_what_one_rank_saw(rank: int) -> None:
    model = sharded()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    # Nothing of this chain waits for the other rank after the look: a rank that went on alone says so.
    opt = optx.wrap(base, optx.AdamR(weight=0.05, norm="l1", normalize=False), skip_nonfinite=True)
    for bad, culprit in ((float("nan"), 1), (float("inf"), 0), (None, None), (float("nan"), 1)):
        train(model, opt, range(1))
        before = [local(p).clone() for p in model.parameters()]
        if bad is not None and rank == culprit:
            grad = next(model.parameters()).grad
            assert grad is not None
            local(grad).view(-1)[0] = bad
        opt.step()
        moved = [not torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True)]
        assert (any(moved), opt.skipped_last) == (bad is None, bad is not None)
    assert opt.skipped_steps == 3


def a_base_that_cannot_step_shards_is_named(rank: int) -> None:
    model = sharded()
    opt = optx.wrap(torch.optim.Adafactor(model.parameters()))  # matrices and vectors: not fused
    before = [local(p).clone() for p in model.parameters()]
    with pytest.raises(optx.OptxError, match=r"Adafactor's own step fails on sharded .* of their own"):
        train(model, opt, range(1))
    assert all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))


# DDP, FSDP2 and the kinds of checkpoints are in test_distributed.
test_on_two_processes = on_processes(
    2,
    full_checkpoint_loads_into_one_process,
    all_ranks_skip_what_one_rank_saw,
    a_base_that_cannot_step_shards_is_named,
)


def test_distributed_checkpoint_on_a_fresh_optimizer_moves_nothing() -> None:
    model = net()
    opt = wrapped(model, optx.PerpGrad(), optx.AdamR(weight=0.05), optx.HFT(model, blocks=r"0|2", seed=1))
    before = copy.deepcopy(model.state_dict())
    first = str(opt.hft.selected())
    get_optimizer_state_dict(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert opt.param_groups[0]["optx.hft.round"] == 0
    assert str(opt.hft.selected()) == first
    assert torch.equal(opt.slot(model[0].weight, opt.adamr, "anchor"), before["0.weight"])
