"""Self-tuning networks over two gloo processes: DDP, FSDP2, and Accelerate with its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import FOLDER, on_processes
from stn_loop import batch, sgd, tuned
from torch import Tensor, nn
from torch.nn import functional as F

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")
Ready = Callable[[nn.Module], tuple[Any, Any]]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def steps(
    model: nn.Module, call: Any, stn: optx.SelfTuning, opt: Any, rank: int | None, which: range
) -> dict[str, Any]:
    """On the whole batch, or on one process's half of it; ``call`` is what a wrapper made of the model."""
    mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    for step in which:
        x, y = (t[mine] for t in batch(step))
        with stn.train_batch(x):
            scaled = x * (1 + stn.hparams["noise"].value + stn.hparams["drop"].value).view(-1, 1)
            F.cross_entropy(call(scaled), y).backward()
        opt.step()
        opt.zero_grad()
        x, y = (t[mine] for t in batch(100 + step))
        with stn.valid_batch(x):
            F.cross_entropy(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        stn.step_hparams()
    return {**stn.state_dict(), **{name: t.clone() for name, t in model.state_dict().items()}}


def one_run(rank: int | None, ready: Ready = lambda model: (model, sgd(model))) -> dict[str, Any]:
    model = plain()
    stn = tuned(model, dropout=None, train_steps=1)
    call, opt = ready(model)
    return steps(model, call, stn, opt, rank, range(4))


def same(found: dict[str, Any]) -> None:
    """As one process on the joined batch; perturbations are of that, and gradients averaged."""
    wanted = torch.load(Path(os.environ[FOLDER], "alone.pt"), weights_only=True)
    assert found.keys() == wanted.keys()
    for key, t in found.items():
        got: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
        torch.testing.assert_close(got, wanted[key], rtol=1e-4, atol=1e-6, msg=key)
        every = [torch.zeros_like(got) for _ in range(2)]
        dist.all_gather(every, got.contiguous())
        assert torch.equal(*every), key


def ddp(rank: int) -> None:
    same(one_run(rank, lambda model: (nn.parallel.DistributedDataParallel(model), sgd(model))))


def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def ready(model: nn.Module) -> tuple[Any, Any]:
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
        return model, sgd(model)

    same(one_run(rank, ready))


def accelerate(rank: int) -> None:
    """Its checkpoint has the handle's state too, and a run that goes back to it ends where it did."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for; the group is there already
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = plain()
    stn = tuned(model, dropout=None, train_steps=1)
    call, opt = accelerator.prepare(model, sgd(model))
    assert accelerator.unwrap_model(call) is model
    accelerator.register_for_checkpointing(stn)
    steps(model, call, stn, opt, rank, range(2))
    folder = str(Path(os.environ[FOLDER], "saved"))
    accelerator.save_state(folder)
    found = steps(model, call, stn, opt, rank, range(2, 4))
    same(found)
    accelerator.load_state(folder)
    assert stn.progress.steps == 2
    again = steps(model, call, stn, opt, rank, range(2, 4))
    assert all(torch.equal(t, again[key]) for key, t in found.items())


def alone(_: int) -> None:
    found = one_run(None)
    assert not torch.equal(found["optx.stn.raw"], found["optx.stn.history"][0, 1:3].float())
    torch.save(found, Path(os.environ[FOLDER], "alone.pt"))


test_on_one_process = on_processes(1, alone)
test_two_processes_are_one_on_their_joined_batch = on_processes(2, ddp, fsdp2, accelerate)
