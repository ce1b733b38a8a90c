"""Columns of the table of engines that need processes: each trains a row in a way that people have.

What is found is tensors by name: "trained", the weights after `tasks.STEPS` steps, and "resumed", those of a
run that was saved before its last steps and gone on with in fresh objects.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from engines.task import ADAMW, STEPS, Task, train
from engines.tasks import BY_NAME
from processes import Job, Team
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import optx

Found = dict[str, Any]
SAVED_AFTER = 3
_OPTIONS = states.StateDictOptions(strict=False)  # HFT: what was never trained has no state, nor is it saved


def whole(t: Tensor) -> Tensor:
    """Gathered from all processes."""
    full: Any = getattr(t, "full_tensor", None)
    return (t if full is None else full()).detach().clone()


def weights(task: Task) -> dict[str, Tensor]:
    """All parameters, and what the handle has besides."""
    found = {name: whole(p) for name, p in task.named_parameters()}
    return found | {f"handle {name}": whole(t) for name, t in sorted(_handle_state(task).items())}


def _handle_state(task: Task) -> dict[str, Tensor]:
    state = {} if task.handle is None else task.handle.state_dict()
    return {name: t for name, t in state.items() if name != "optx.abmll.tasks"}  # each process has some


# How far a tuning has come is in the handle's state_dict (`extra`), not in its folder.
_PROGRESS = ("optx.stn.adam", "optx.stn.counts", "optx.stn.history")


def _kept(task: Task) -> dict[str, Tensor]:
    """What `Handle.save` keeps."""
    return {name: whole(t) for name, t in _handle_state(task).items() if name not in _PROGRESS}


def make(row: str) -> Task:
    """A row's task, always with the same weights."""
    return BY_NAME[row].task(BY_NAME[row])


def cell(run: Callable[[str, Team], Found], row: str) -> Callable[[Team], Found]:
    """A column's cell of a row, as it can be sent to another process."""
    return functools.partial(_found_by, run, row)


def _found_by(run: Callable[[str, Team], Found], row: str, team: Team) -> Found:
    """What a cell finds, or the words that it is refused with."""
    try:
        return run(row, team)
    except optx.OptxError as error:
        return {"refused": str(error)}


def here(jobs: Iterable[Job]) -> dict[str, Found]:
    """Cells that need one process, by this one: four would import all trainers."""
    with tempfile.TemporaryDirectory() as folder:
        return {job.name: job.run(Team(0, 1, Path(folder))) for job in jobs}


# ---- one process -------------------------------------------------------------------------------------------


def one_process(row: str, team: Team) -> Found:
    """The joined batch."""
    task = make(row)
    found: Found = {"start": weights(task)}
    opt = task.optimizer()
    train(task, task, opt, range(SAVED_AFTER))
    if task.handle is not None:
        found["numbers"] = _numbers(task)  # then, as STN's history grows with each step
    train(task, task, opt, range(SAVED_AFTER, STEPS))
    return found | {"trained": weights(task)}


def _numbers(task: Task) -> Tensor:
    """What the handle's report counts."""
    return torch.tensor([[row.trainable, row.stored] for row in task.handle.report().rows])


# ---- DDP ---------------------------------------------------------------------------------------------------


def ddp(row: str, team: Team) -> Found:
    """DistributedDataParallel; saved as torch.save has it."""
    task, call, opt = _under_ddp(row)
    train(task, call, opt, range(SAVED_AFTER), team.rank, team.world)
    saved = copy.deepcopy((task.state_dict(), opt.state_dict(), task.extra()))
    train(task, call, opt, range(SAVED_AFTER, STEPS), team.rank, team.world)
    again, call, fresh = _under_ddp(row)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    again.load_extra(saved[2])
    train(again, call, fresh, range(SAVED_AFTER, STEPS), team.rank, team.world)
    return {"trained": weights(task), "resumed": weights(again)}


def _under_ddp(row: str) -> tuple[Task, nn.Module, Any]:
    task = make(row)
    call = nn.parallel.DistributedDataParallel(task, find_unused_parameters=task.row.unused)
    return task, call, task.optimizer(call)


# ---- FSDP2 -------------------------------------------------------------------------------------------------


def shard(task: Task, mesh: DeviceMesh) -> None:
    """`fully_shard` as its documentation has it: each block, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in task.net.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
            break
    fully_shard(task, mesh=mesh)


def _sharded(row: str, mesh: DeviceMesh) -> tuple[Task, Any]:
    task = make(row)
    shard(task, mesh)
    return task, task.optimizer()


def fsdp2(row: str, team: Team) -> Found:
    """Sharded, then wrapped; saved by torch.distributed.checkpoint, and the adapter by its handle."""
    mesh = init_device_mesh("cpu", (team.world,))
    task, opt = _sharded(row, mesh)
    train(task, task, opt, range(SAVED_AFTER), team.rank, team.world)
    folder = team.folder / "saved" / row
    dcp.save(_state(task, opt), checkpoint_id=folder)
    found: Found = {}
    if task.handle is not None:
        task.handle.save(folder / "adapter")
        found["adapter"] = _kept(task)
        found["numbers"] = _numbers(task)
    torch.save(task.extra(), folder / f"extra.{team.rank}")
    train(task, task, opt, range(SAVED_AFTER, STEPS), team.rank, team.world)
    found["trained"] = weights(task)
    found["resumed"] = fsdp2_resumed(row, team)["resumed"]
    return found


def fsdp2_resumed(row: str, team: Team) -> Found:
    """Goes on from what `fsdp2` saved, on as many processes or others."""
    task, opt = _sharded(row, init_device_mesh("cpu", (team.world,)))
    return _gone_on(task, opt, row, team)


def alone_resumed(row: str, team: Team) -> Found:
    """The same in one process, unsharded."""
    task = make(row)
    return _gone_on(task, task.optimizer(), row, team)


def _gone_on(task: Task, opt: Any, row: str, team: Team) -> Found:
    folder = team.folder / "saved" / row
    found: Found = {}
    if task.handle is not None:
        other = make(row)
        if team.world > 1:
            shard(other, init_device_mesh("cpu", (team.world,)))
        other.handle.load(folder / "adapter")
        found["adapter"] = _kept(other)
    loading = opt.hft.loading if row == "HFT" else None
    with _nothing() if loading is None else loading():
        state = _state(task, opt)
        planner = DefaultLoadPlanner(allow_partial_load=row == "HFT")
        dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=team.world == 1)
        states.set_model_state_dict(task, state["model"])
        states.set_optimizer_state_dict(task, opt, state["optimizer"], options=_OPTIONS)
    task.load_extra(torch.load(folder / "extra.0", weights_only=True))
    train(task, task, opt, range(SAVED_AFTER, STEPS), team.rank, team.world)
    return found | {"resumed": weights(task)}


def _state(task: Task, opt: Any) -> dict[str, Any]:
    return {
        "model": states.get_model_state_dict(task),
        "optimizer": states.get_optimizer_state_dict(task, opt, options=_OPTIONS),
    }


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def hsdp(row: str, team: Team) -> Found:
    """Replicas of shards, on a mesh of 2 x 2."""
    task, opt = _sharded(row, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    train(task, task, opt, range(STEPS), team.rank, team.world)
    return {"trained": weights(task)}


def wrapped_then_sharded(row: str, team: Team) -> Found:
    """The optimizer is made of the whole model, and its parameters are replaced then, as Accelerate does."""
    task = make(row)
    opt = task.optimizer()
    names = {id(p): name for name, p in task.named_parameters()}
    shard(task, init_device_mesh("cpu", (team.world,)))
    new = dict(task.named_parameters())
    for group in opt.param_groups:
        group["params"] = [new[names[id(p)]] for p in group["params"]]
    train(task, task, opt, range(STEPS), team.rank, team.world)
    return {"trained": weights(task)}


# ---- torch's ZeRO-1, FSDP1, tensor parallelism -------------------------------------------------------------


def zero_redundancy(row: str, team: Team) -> Found:
    """torch's ZeroRedundancyOptimizer as the base, under DDP: each process keeps a part of the moments."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    task = make(row)
    call = nn.parallel.DistributedDataParallel(task, find_unused_parameters=task.row.unused)
    params = [p for _, p in task.trained()]
    opt = task.optimizer(call, ZeroRedundancyOptimizer(params, torch.optim.AdamW, **ADAMW | task.row.adamw))
    train(task, call, opt, range(STEPS), team.rank, team.world)
    return {"trained": weights(task)}


def fsdp1(row: str, team: Team) -> Found:
    """FullyShardedDataParallel, whose parameters are pieces of a flat one."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    task = make(row)
    call = FullyShardedDataParallel(task, use_orig_params=True, device_id=torch.device("cpu"))
    opt = task.optimizer(call)
    train(task, call, opt, range(STEPS), team.rank, team.world)
    with FullyShardedDataParallel.summon_full_params(call, writeback=False):
        return {"trained": weights(task)}
