"""The Triton step on local shards of DTensors: two gloo processes, each with its interpreter.

They are forked from this one, which has imported everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import forked
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")

# Two chunks a shard; cut unevenly; nothing on the second process; the same on both.
SHAPES = ((2, 4100), (5, 3), (1, 8), (6,))
PLACES = (Shard(0), Shard(0), Shard(0), Replicate())
CHAINS: dict[str, Callable[[], Sequence[optx.Transform]]] = {
    "none": lambda: [],
    "perp": lambda: [optx.PerpGrad()],
    "both": lambda: [optx.PerpGrad(), optx.AdamR(weight=0.05)],
}


def drawn(seed: int) -> list[Tensor]:
    return [torch.randn(s, generator=torch.Generator().manual_seed(seed + i)) for i, s in enumerate(SHAPES)]


def stepped(chain: str, fused: Any, mesh: DeviceMesh | None) -> tuple[list[nn.Parameter], Any]:
    """Weights after two steps, over a mesh or in one process."""

    def lie(tensors: Sequence[Tensor]) -> list[Tensor]:
        if mesh is None:
            return list(tensors)
        return [distribute_tensor(t, mesh, [place]) for t, place in zip(tensors, PLACES, strict=True)]

    parameters = [nn.Parameter(w) for w in lie(drawn(0))]
    base = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0)
    opt = optx.wrap(base, *CHAINS[chain](), fused=fused, metrics=True)
    for step in range(2):
        for p, g in zip(parameters, lie(drawn(100 * step + 100)), strict=True):
            p.grad = g
        opt.step()
    return parameters, opt


def shards_are_the_one_process(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for chain in CHAINS:
        found, opt = stepped(chain, "triton", mesh)
        assert str(opt.plan()).startswith("group 0: fused triton on local shards (4 tensors"), chain
        (alone, one), (cpu, other) = stepped(chain, False, None), stepped(chain, "cpu", mesh)
        for p, q, w in zip(found, cpu, alone, strict=True):
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.full_tensor(), w, rtol=0, atol=1e-6)
            torch.testing.assert_close(p.to_local(), q.to_local(), rtol=0, atol=1e-6)  # type: ignore[attr-defined]
        assert opt.metrics() == pytest.approx(one.metrics(), rel=1e-5)
        assert opt.metrics() == pytest.approx(other.metrics(), rel=1e-5)
        assert {float(state["step"]) for state in opt.state.values()} == {2.0}


@optx.rule(writes="row")
def across(g: Any) -> Any:
    return g * 1.0


@optx.rule(writes="g")
def centred(g: Any, row: Any, columns: Any) -> Any:
    return g - row / columns


class Centred(optx.Transform):
    name = "centred"
    rules = {"row_sums": across, "gradient": centred}  # noqa: RUF012


def sums_over_rows_of_shards_are_left_to_others(rank: int) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(2, 4), init_device_mesh("cpu", (2,)), [Shard(0)]))
    with pytest.raises(optx.FusedError, match="of sharded parameters, which only the CPU's kernels do"):
        optx.wrap(torch.optim.SGD([p], lr=0.1), Centred(), fused="triton")


def draws_of_bfloat16(rank: int) -> None:
    """Others in each shard, the same in its replicas."""
    mesh = init_device_mesh("cpu", (2,))
    for place, same in ((Shard(0), False), (Replicate(), True)):
        ones = torch.ones(2, 512, dtype=torch.bfloat16)
        p = nn.Parameter(distribute_tensor(ones, mesh, [place]))
        opt = optx.wrap(torch.optim.AdamW([p], lr=1e-3), optx.PerpGrad(), fused="triton")
        p.grad = distribute_tensor(ones * 1e-3, mesh, [place])
        opt.step()
        local = p.detach().to_local()  # type: ignore[attr-defined]
        assert len(local.unique()) == 2
        both = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(both, local)
        assert torch.equal(*both) is same


@pytest.mark.long
def test_on_two_processes(tmp_path: Path) -> None:
    forked(
        tmp_path,
        2,
        shards_are_the_one_process,
        draws_of_bfloat16,
        sums_over_rows_of_shards_are_left_to_others,
    )
