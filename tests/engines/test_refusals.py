"""Engines that leave a process with pieces of parameters are refused by name, before a step is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")
PIECE = "is a piece of a flat parameter of FSDP1 .*fully_shard"


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    meeting = f"file://{tmp_path}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1, timeout=timedelta(minutes=1))
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def fsdp1(model: nn.Module, original: bool = True) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def transforms(model: nn.Module) -> list[optx.Transform]:
    return [optx.PerpGrad(), optx.AdamR(), optx.SaRA(fraction=0.5), optx.DSPReg(2)]


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_refused_at_wrap(original: bool) -> None:
    model = fsdp1(net(), original)
    for transform in transforms(model):
        with pytest.raises(optx.TransformError, match=f"{type(transform).__name__}: parameter .* {PIECE}"):
            optx.wrap(adamw(model), transform)
    optx.wrap(adamw(model), fused=False)  # nothing is taken over a tensor
    optx.wrap(torch.optim.AdamW([{"params": model.parameters(), optx.PerpGrad.name: False}]), optx.PerpGrad())


def test_fsdp1_that_comes_after_wrap_is_refused_at_the_first_step() -> None:
    model = net()
    opt = optx.wrap(adamw(model), optx.PerpGrad(), fused=False)
    sharded = fsdp1(model)
    sharded(torch.ones(3, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(optx.TransformError, match=PIECE):
            opt.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_fsdp1_that_replaces_parameters_is_refused_too() -> None:
    """As Accelerate does it; also after steps were taken."""
    model = net()
    opt = optx.wrap(adamw(model), optx.PerpGrad(), fused=False)
    model(torch.ones(3, 4)).sum().backward()
    opt.step()
    opt.param_groups[0]["params"] = list(fsdp1(model, original=False).parameters())
    with pytest.raises(optx.TransformError, match=PIECE):
        opt.step()


def test_fsdp1_is_refused_by_attach_and_by_what_averages_weights() -> None:
    model = net()
    sharded = fsdp1(model)
    for given in (sharded, model):
        with pytest.raises(optx.OptxError, match=r"FullyShardedDataParallel.*Attach"):
            optx.attach(given, optx.LoRA(rank=2), nn.Linear)
    with pytest.raises(optx.OptxError, match=f"MESA: .* {PIECE.split(' .*')[0]}.*use optx.SAF"):
        optx.MESA(sharded)


def test_a_flat_buffer_in_the_place_of_all_parameters_is_refused() -> None:
    """What DeepSpeed's ZeRO-1 and ZeRO-2 leave in the groups: one vector, of a process's share."""
    model = net()
    opt = optx.wrap(adamw(model), optx.PerpGrad(), fused=False)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.param_groups[0]["params"] = [nn.Parameter(flat[:22])]
    for call in (opt.step, opt.state_dict):
        with pytest.raises(
            optx.TransformError, match=r"4 parameters of group 0 .* one flat tensor of 22 num"
        ):
            call()


def test_one_vector_may_take_a_vectors_place() -> None:
    bias = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.AdamW([bias]), optx.PerpGrad(), fused=False)
    opt.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()


# ---- HFT's rounds under DDP --------------------------------------------------------------------------------


def rounds(model: nn.Module, **options: Any) -> optx.HFT:
    return optx.HFT(model, blocks=r"(module\.)?[02]", level="model", **options)


def test_a_ddp_that_knows_half_of_the_model_is_refused_at_the_next_round() -> None:
    model = net()
    opt = optx.wrap(adamw(model), rounds(model, rounds_every=1), fused=False)
    ddp: Callable[..., Any] | None = DistributedDataParallel(model)
    assert ddp is not None
    ddp(torch.ones(3, 4)).sum().backward()
    with pytest.raises(
        optx.TransformError, match=r"made while a round held .* drop it, call opt.hft.next_ro"
    ):
        opt.step()
    ddp = None
    assert opt.hft.next_round().round == 1
    DistributedDataParallel(model)(torch.ones(3, 4)).sum().backward()


def test_a_ddp_of_the_whole_model_serves_all_rounds() -> None:
    ddp = DistributedDataParallel(net(), find_unused_parameters=True)
    opt = optx.wrap(adamw(ddp), rounds(ddp, rounds_every=1), fused=False)
    for _ in range(3):
        ddp(torch.ones(3, 4)).sum().backward()
        opt.step()
    assert opt.hft.round == 3
