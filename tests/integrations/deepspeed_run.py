"""DeepSpeed's ZeRO-1 and ZeRO-2 through Accelerate on two processes: what trains, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import optx

STEPS, BATCH = 3, 8


def net() -> tuple[nn.Sequential, optx.Handle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0|2")
    optx.trainable_only(model, handle)
    return model, handle


def loss(model: nn.Module, step: int = 0, alone: bool = False) -> torch.Tensor:
    """Of a process's share; without a GPU Accelerate takes each process for the first, and torch does not."""
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=draw), torch.randint(3, (BATCH,), generator=draw)
    return nn.functional.cross_entropy(model(x[rank::world]), y[rank::world])


def adamw(handle: optx.Handle) -> torch.optim.Optimizer:
    return torch.optim.AdamW(handle.parameters(), lr=5e-3, eps=1e-3)


def alone() -> list[torch.Tensor]:
    """What one process comes to."""
    model, handle = net()
    opt = adamw(handle)
    for step in range(STEPS):
        opt.zero_grad()
        loss(model, step, alone=True).backward()
        opt.step()
    return [p.detach() for p in handle.parameters()]


def accelerator(stage: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # which is 1 where nothing is said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def trained(stage: int) -> float:
    """How far an adapter is from one process's, with an optimizer that isn't wrapped."""
    made = accelerator(stage)
    model, handle = net()
    engine, opt = made.prepare(model, adamw(handle))
    for step in range(STEPS):
        made.backward(loss(engine, step))
        opt.step()
        opt.zero_grad()
    return max(float((p - q).detach().abs().max()) for p, q in zip(handle.parameters(), alone(), strict=True))


def refused(stage: int) -> dict[str, Any]:
    """What a wrapped optimizer and checkpoints of adapters are told, and whether weights are as before."""
    made = accelerator(stage)
    model, handle = net()
    before = [p.detach().clone() for p in model.parameters()]
    engine, _ = made.prepare(model, optx.wrap(adamw(handle), optx.PerpGrad()))
    told: dict[str, Any] = {"kind": made.distributed_type.value}
    try:
        made.backward(loss(engine))  # DeepSpeed steps in it
    except optx.TransformError as error:
        told["wrapped"] = str(error)
    try:
        optx.integrations.accelerate.adapters_only(made, handle)
    except optx.OptxError as error:
        told["adapters_only"] = str(error)
    return {**told, "kept": all(map(torch.equal, before, model.parameters()))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {stage: {"off": trained(stage), **refused(stage)} for stage in (1, 2)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
