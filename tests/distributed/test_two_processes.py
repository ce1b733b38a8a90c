"""Two gloo processes: DDP, FSDP2 and distributed checkpoints, each beside the same run in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import on_two_processes
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


def assert_close(model: nn.Module, reference: nn.Module) -> None:
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(a).detach(), b.detach(), rtol=0, atol=1e-6)


def ddp_equals_one_process(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    opt = wrapped(model)
    assert opt.plan()[0].path == "fused cpu"
    train(model, opt, range(3), slice(4 * rank, 4 * rank + 4))
    reference = net()
    train(reference, wrapped(reference), range(3))
    assert_close(model, reference)


def fsdp_reduces_over_the_mesh(rank: int) -> None:
    model, reference = sharded(), net()
    opt = wrapped(model)
    assert opt.plan()[0].path == "fused cpu"
    assert opt.plan()[0].on_shards
    train(model, opt, range(4))
    train(reference, wrapped(reference), range(4))
    assert_close(model, reference)
    # The check can fail: a projection by this rank's shard alone is another step.
    w = next(model.parameters())
    g = torch.ones_like(w)
    alone = (local(w) * local(g)).sum() / (local(w) * local(w)).sum()
    together = whole((w * g).sum()) / whole((w * w).sum())
    assert abs(float(alone - together)) > 1e-3


def unnormalised_l1_pull_on_shards(rank: int) -> None:
    model, reference = sharded(), net()
    pull: Callable[[], optx.AdamR] = lambda: optx.AdamR(weight=0.1, norm="l1", normalize=False)  # noqa: E731
    train(model, wrapped(model, pull()), range(4))
    train(reference, wrapped(reference, pull()), range(4))
    assert_close(model, reference)


def checkpoint_resumes_bit_for_bit(rank: int) -> None:
    model = sharded()
    opt = wrapped(model)
    train(model, opt, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    again = sharded()
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        local(a.data).copy_(local(b.data))
    fresh = wrapped(again)  # its anchors are the trained weights, until the checkpoint brings the real ones
    before = [local(p).clone() for p in again.parameters()]
    set_optimizer_state_dict(again, fresh, saved)
    assert all(torch.equal(a, local(b)) for a, b in zip(before, again.parameters(), strict=True))
    train(model, opt, range(3, 5))
    train(again, fresh, range(3, 5))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(local(a), local(b))


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
    opt = optx.wrap(base, optx.AdamR(weight=0.05, normalize=False), skip_nonfinite=True)
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


CASES: list[Callable[[int], None]] = [
    ddp_equals_one_process,
    fsdp_reduces_over_the_mesh,
    unnormalised_l1_pull_on_shards,
    checkpoint_resumes_bit_for_bit,
    full_checkpoint_loads_into_one_process,
    all_ranks_skip_what_one_rank_saw,
]


def test_two_processes() -> None:
    on_two_processes(CASES)


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
