"""What test_distributed has done on two gloo processes: each gives what it found."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import FOLDER
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import optx
from optx import AdamR, PerpGrad
from optx.step.state import saved_slots

WORLD = 2
Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0),
    "Adam, amsgrad, coupled decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


def both() -> list[optx.Transform]:
    """One chain for all, and that of test_local_shards: each other one would be compiled."""
    return [PerpGrad(), AdamR(weight=0.1)]


def net(seed: int = 0) -> nn.Module:
    """Shapes that two processes do not share evenly: 7 rows, 3, and 1 (one process has none)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 4)
    )


def sharded(seed: int = 0) -> nn.Module:
    """The same over two processes."""
    model = net(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range, rank: int | None = None) -> None:
    """An ordinary loop on the joined batch, or on one process's half of it."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=g), torch.randint(4, (8,), generator=g)
        if rank is not None:
            x, y = x[rank::WORLD], y[rank::WORLD]
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies, gathered from all processes."""
    return {
        name.removeprefix("module."): (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, whole."""
    return whole(model.named_parameters())


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---- DDP --------------------------------------------------------------------------------------------------


def ddp(rank: int) -> dict[str, Any]:
    """Under DDP, and in one process on the joined batch."""
    found: dict[str, Any] = {}
    for fused in ("auto", False):
        alone = net()
        train(alone, optx.wrap(BASES["AdamW"](alone.parameters()), *both(), fused=fused), range(5))
        parallel = nn.parallel.DistributedDataParallel(net())
        opt = optx.wrap(BASES["AdamW"](parallel.parameters()), *both(), fused=fused)
        train(parallel, opt, range(5), rank)
        found[opt.plan()[0].path] = {
            "off": off(weights(parallel), weights(alone)),
            "moved": off(weights(alone), weights(net())),
            "weights": weights(parallel),
        }
    return found


# ---- FSDP2 ------------------------------------------------------------------------------------------------


def fsdp(rank: int) -> dict[str, Any]:
    """Bases with DTensor parameters, and unsharded; other chains are in test_local_shards and the engines."""
    found: dict[str, Any] = {}
    for base, make in BASES.items():
        alone = net()
        train(
            alone,
            optx.wrap(make(alone.parameters()), *both(), fused="auto" if base == "AdamW" else False),
            range(5),
        )
        model = sharded()
        opt = optx.wrap(make(model.parameters()), *both())
        train(model, opt, range(5), rank)
        found[base] = {
            "off": off(weights(model), weights(alone)),
            "shards": [p.to_local().shape[0] for p in model.parameters()],
            "types": {k: type(v).__name__ for k, v in opt.state[next(model.parameters())].items()},
            "plan": str(opt.plan()),
        }
    return found


def replaced(rank: int) -> dict[str, Any]:
    """Wrapped first, sharded then (as Accelerate does): parameters are other objects afterwards."""
    alone = net()
    train(alone, optx.wrap(BASES["AdamW"](alone.parameters()), *both()), range(5))
    model = net()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), *both())
    names = {id(p): name for name, p in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    new = dict(model.named_parameters())
    group = opt.param_groups[0]
    group["params"] = [new[names[id(p)]] for p in group["params"]]
    train(model, opt, range(5), rank)
    anchors = whole((n, opt.slot(p, opt.adamr, "anchor")) for n, p in model.named_parameters())
    return {"off": off(weights(model), weights(alone)), "anchors": off(anchors, weights(net()))}


def local(rank: int) -> dict[str, Any]:
    """One step of perpGrad reduced over the mesh, and reduced over each process's shard alone."""
    make = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    alone, model, shards = net(), sharded(), sharded()
    train(alone, optx.wrap(make(alone.parameters()), PerpGrad(), fused=False), range(1))
    train(model, optx.wrap(make(model.parameters()), PerpGrad(), fused=False), range(1), rank)
    train(shards, torch.optim.SGD(shards.parameters(), lr=0.0), range(1), rank)  # for its gradients
    mine = [nn.Parameter(p.to_local()) for p in shards.parameters()]
    for p, full in zip(mine, shards.parameters(), strict=True):
        p.grad = full.grad.to_local()  # type: ignore[union-attr]
    optx.wrap(make(mine), PerpGrad(), fused=False).step()
    return {
        "mesh": off(weights(model), weights(alone)),
        "local": off(weights(shards), weights(alone)),
    }


# ---- checkpoints ------------------------------------------------------------------------------------------


def checkpoint(rank: int) -> dict[str, Any]:
    """Save sharded, full and broadcast; load into a fresh pair; go on; and beside it the whole run."""
    import torch.distributed.checkpoint as dcp

    kinds = {
        "sharded": StateDictOptions(),
        "full": StateDictOptions(full_state_dict=True),
        "broadcast": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    }
    folder = Path(os.environ[FOLDER])
    found: dict[str, Any] = {}
    for kind, options in kinds.items():
        model = sharded()
        opt = optx.wrap(BASES["AdamW"](model.parameters()), *both())
        train(model, opt, range(3), rank)
        saved = copy.deepcopy(
            {
                "model": get_model_state_dict(model, options=options),
                "opt": get_optimizer_state_dict(model, opt, options=options),
            }
        )
        train(model, opt, range(3, 6), rank)
        other = sharded(seed=1)
        fresh = optx.wrap(BASES["AdamW"](other.parameters()), *both())
        before = weights(other)
        if kind in ("sharded", "flat"):  # through files
            dcp.save(saved, checkpoint_id=folder / kind)
            saved = {
                "model": get_model_state_dict(other, options=options),
                "opt": get_optimizer_state_dict(other, fresh, options=options),
            }
            dcp.load(saved, checkpoint_id=folder / kind)
        else:
            get_optimizer_state_dict(other, fresh, options=options)
        moved = off(weights(other), before) if kind != "sharded" and kind != "flat" else 0.0
        set_model_state_dict(other, saved["model"], options=options)
        set_optimizer_state_dict(other, fresh, saved["opt"], options=options)
        train(other, fresh, range(3, 6), rank)
        anchors = whole((n, fresh.slot(p, fresh.adamr, "anchor")) for n, p in other.named_parameters())
        found[kind] = {
            "moved": moved,
            "off": off(weights(model), weights(other)),
            "anchors": off(anchors, weights(net())),
        }
    try:
        optx.save_optimizer(fresh, folder / "opt.safetensors")
    except optx.OptxError as error:
        found["save_optimizer"] = str(error)
    return found


# ---- ZeroRedundancyOptimizer ----------------------------------------------------------------------------


def zero(rank: int) -> dict[str, Any]:
    """The base's moments lie on one process each: trained, saved, loaded and gone on with; and unsharded."""

    def transforms() -> list[optx.Transform]:
        return [PerpGrad(), AdamR(weight=0.1, normalize=False)]

    def make(model: nn.Module) -> optx.Wrapped:
        base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01, weight_decay=0)
        return optx.wrap(base, *transforms())

    alone, model = net(), net()
    train(alone, optx.wrap(BASES["AdamW"](alone.parameters()), *transforms(), fused=False), range(6))
    opt = make(model)
    train(model, opt, range(3))
    opt.base.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    box = [copy.deepcopy((opt.state_dict(), model.state_dict())) if rank == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    found: dict[str, Any] = {"slots in the file": len(saved_slots(box[0][0]))}
    other = net(seed=1)
    fresh = make(other)
    fresh.load_state_dict(box[0][0])
    other.load_state_dict(box[0][1])
    anchors = {n: fresh.slot(p, fresh.adamr, "anchor") for n, p in other.named_parameters()}
    found["anchors"] = off(anchors, weights(net()))
    before, held = weights(model), dict(opt.base.optim.state)  # type: ignore[attr-defined]
    counts = [float(state["step"]) for state in held.values()]
    hook = opt.base.optim.register_step_post_hook(lambda *_: 1 / 0)  # type: ignore[attr-defined]
    try:
        train(model, opt, range(3, 4))
    except ZeroDivisionError:
        found["failed"] = off(weights(model), before)
        found["counted"] = [float(s["step"]) for s in opt.base.optim.state.values()] != counts  # type: ignore[attr-defined]
    hook.remove()
    train(model, opt, range(3, 6))
    train(other, fresh, range(3, 6))
    again = [copy.deepcopy(box[0][0])]
    found |= {"off": off(weights(model), weights(alone)), "resumed": off(weights(other), weights(model))}
    fresh.base.load_state_dict(again[0])  # behind our back; None for what other processes keep
    train(other, fresh, range(1))
    return found
