"""Masks over two gloo processes: of shards they are the whole's, and each sets and looks at its part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import nn

import optx
from optx import Masks, OptxError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")


def net() -> nn.Sequential:
    """Rows that two processes share unevenly: 7, 3, and 1 (one has none); 13 numbers are no whole bytes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 3), nn.Linear(3, 1), nn.Conv2d(2, 5, 3))


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def whole(model: nn.Module) -> dict[str, Any]:
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def shards_are_found_set_and_looked_at(rank: int) -> None:
    model = net()
    masks = optx.prune(model, optx.Magnitude(0.5))
    shards = sharded(net())
    masks.apply_(shards)
    for (name, p), q in zip(model.named_parameters(), whole(shards).values(), strict=True):
        assert torch.equal(p, q), name
    masks.verify(shards)
    assert Masks.of(shards) == masks


def one_process_alone_has_regrown_and_both_say_so(rank: int) -> None:
    shards = sharded(net())
    masks = Masks.from_bool({"0.weight": torch.arange(91).view(7, 13) % 2 == 0})
    masks.apply_(shards)
    with torch.no_grad():
        if rank == 1:
            shards[0].weight.to_local()[-1].fill_(1)  # type: ignore[index]
    with pytest.raises(OptxError, match=r"6 masked weights are not 0, in 1 of 1: '0.weight' \(6 of 45\)"):
        masks.verify(shards)


def columns_of_tensor_parallel_too(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    masks = optx.prune(model, optx.Magnitude(0.5))
    mesh = init_device_mesh("cpu", (2,))
    parts = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    masks.apply_(parts)
    masks.verify(parts)
    assert Masks.of(parts) == masks


def wrapped_by_ddp(rank: int) -> None:
    model = net()
    masks = optx.prune(model, optx.Magnitude(0.5))
    model = nn.parallel.DistributedDataParallel(net())
    masks.apply_(model)
    masks.verify(model)
    assert Masks.of(model) == masks
    assert set(masks.parameters_of(model)) == set(masks)


test_on_two_processes = on_processes(
    2,
    shards_are_found_set_and_looked_at,
    one_process_alone_has_regrown_and_both_say_so,
    columns_of_tensor_parallel_too,
    wrapped_by_ddp,
)
