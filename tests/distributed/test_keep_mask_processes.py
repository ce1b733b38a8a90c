"""`optx.KeepMask` under FSDP2, on two gloo processes: as in one, with the bits sharded as their weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import on_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import optx

KEY = "optx.keep_mask.kept"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 7), nn.Linear(7, 5))  # uneven rows; rows of 16 and of 7


def masks_of(model: nn.Module) -> optx.Masks:
    g = torch.Generator().manual_seed(1)
    named = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    return optx.Masks.from_bool({n: torch.rand(p.shape, generator=g) > 0.5 for n, p in named})


def run(opt: Any, model: nn.Module, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=g)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        opt.step()


def wrapped(model: nn.Module, masks: optx.Masks) -> Any:
    """Shards by kernels, one process by torch's operations."""
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)
    return optx.wrap(base, optx.KeepMask(masks), fused=isinstance(model[0].weight, DTensor))


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def sharded(masks: optx.Masks) -> nn.Module:
    model = net()
    masks.apply_(model)
    return fully_shard(model)


def case_as_in_one_process(rank: int) -> None:
    alone = net()
    masks = masks_of(alone)
    masks.apply_(alone)
    run(wrapped(alone, masks), alone, range(4))
    model = sharded(masks)
    opt = wrapped(model, masks)
    run(opt, model, range(4))
    for a, b in zip(whole(alone), whole(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    masks.verify(model)
    packed, plain = (opt.state[p][KEY] for p in (model[0].weight, model[1].weight))
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, 2)
    assert packed.to_local().shape[0] == model[0].weight.to_local().shape[0]
    assert torch.equal(packed.full_tensor(), masks.packed("0.weight"))
    assert plain.dtype == torch.bool
    assert torch.equal(plain.full_tensor(), masks["1.weight"])
    assert opt.keep_mask.current() == masks


def case_from_zeros(rank: int) -> None:
    masks = masks_of(net())
    model = sharded(masks)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    opt = optx.wrap(base, optx.KeepMask(), fused=True)
    run(opt, model, range(2))
    assert opt.keep_mask.current() == masks


def case_over_another_dimension(rank: int) -> None:
    """Bits can't be cut along rows there: bytes are kept."""
    model = net()
    masks = masks_of(model)
    masks.apply_(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    base = torch.optim.AdamW([("0.weight", model[0].weight)], lr=0.01)
    opt = optx.wrap(base, optx.KeepMask(masks, model), fused=True)
    g = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    model[0].weight.grad = distribute_tensor(g, mesh, [Shard(1)])
    opt.step()
    masks.verify(model)
    assert opt.state[model[0].weight][KEY].dtype == torch.bool
    assert opt.state[model[0].weight][KEY].placements == (Shard(1),)


def case_distributed_checkpoint(rank: int) -> None:
    masks = masks_of(net())
    model = sharded(masks)
    opt = wrapped(model, masks)
    run(opt, model, range(2))
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    saved = get_optimizer_state_dict(model, opt)
    dcp.save(saved, checkpoint_id=Path(folder[0]))
    again = sharded(masks)
    other = wrapped(again, masks)
    into = get_optimizer_state_dict(again, other)
    dcp.load(into, checkpoint_id=Path(folder[0]))
    set_optimizer_state_dict(again, other, into)
    assert other.keep_mask.current() == masks
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    run(opt, model, range(2, 4))
    run(other, again, range(2, 4))
    assert all(map(torch.equal, whole(model), whole(again)))
    masks.verify(again)


test_on_two_processes = on_processes(
    2, case_as_in_one_process, case_from_zeros, case_over_another_dimension, case_distributed_checkpoint
)
