"""Accelerate and Lightning on two gloo processes: DDP and FSDP2, whose checkpoints of adapters resume."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optx

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
BATCHES = 2 * [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]  # two epochs


def folder(name: str) -> Path:
    return Path(os.environ["OPTX_TEST_FOLDER"], name)


def as_launched(rank: int) -> None:
    """What torchrun would have set."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="test", ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def adapted() -> tuple[nn.Sequential, optx.Handle]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    handle = optx.attach(net, optx.LoRA(rank=2), targets="0|2")
    optx.trainable_only(net, handle)
    return net, handle


def optimizer(handle: optx.Handle) -> optx.Wrapped:
    base = torch.optim.AdamW(handle.parameters(), lr=0.05, weight_decay=0.0)
    return optx.wrap(base, optx.PerpGrad(), optx.AdamR(weight=0.05))


def alone(steps: int = 4) -> dict[str, Tensor]:
    """The adapter after one process's run over whole batches."""
    net, handle = adapted()
    opt = optimizer(handle)
    for x in BATCHES[:steps]:
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return handle.state_dict()


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, t in wanted.items():
        whole = getattr(found[key], "full_tensor", lambda t=found[key]: t)()
        torch.testing.assert_close(whole.detach(), t, rtol=1e-5, atol=1e-6, msg=key)


# ---- Accelerate -------------------------------------------------------------------------------------------


def accelerated(rank: int, plugin: Any = None) -> tuple[Any, Any, optx.Handle, Any]:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from accelerate_run import fresh

    as_launched(rank)
    accelerator = fresh()
    assert accelerator.num_processes == 2
    if plugin is not None:  # which Accelerate takes on GPUs alone; on them it does no more than this
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    net, handle = adapted()
    model, opt = accelerator.prepare(net, optimizer(handle))
    return accelerator, model, handle, opt


def steps(accelerator: Any, model: Any, opt: Any, numbers: range) -> None:
    for number in numbers:
        x = BATCHES[number].chunk(2)[accelerator.process_index]
        accelerator.backward(model(x).square().mean())
        opt.step()
        opt.zero_grad()


def _accelerate_ddp(rank: int) -> None:
    accelerator, model, handle, opt = accelerated(rank)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    optx.integrations.accelerate.adapters_only(accelerator, handle)
    steps(accelerator, model, opt, range(2))
    accelerator.save_state(str(folder("ddp")))
    steps(accelerator, model, opt, range(2, 4))
    close(handle.state_dict(), alone())
    assert not list(folder("ddp").glob("model*"))
    accelerator, model, again, opt = accelerated(rank)
    optx.integrations.accelerate.adapters_only(accelerator, again)
    accelerator.load_state(str(folder("ddp")))
    steps(accelerator, model, opt, range(2, 4))
    assert all(map(torch.equal, again.parameters(), handle.parameters()))
    told = optx.integrations.accelerate.metrics(accelerator, again)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, told)
    assert every[0] == every[1] == told


def _accelerate_fsdp2(rank: int) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.checkpoint import FileSystemReader

    def start() -> tuple[Any, Any, optx.Handle, Any]:
        return accelerated(rank, FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap"))

    accelerator, model, handle, opt = start()
    assert hasattr(handle.parameters()[0], "full_tensor")
    assert accelerator.is_fsdp2
    saving = optx.integrations.accelerate.adapters_only(accelerator, handle)
    steps(accelerator, model, opt, range(2))
    accelerator.save_state(str(folder("fsdp2")))
    saved = FileSystemReader(folder("fsdp2") / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    assert sorted(saved) == [f"model.{n}.optx.lora.{x}" for n in "02" for x in "AB"]
    _, read = adapted()
    read.load(folder("fsdp2"))
    close(handle.state_dict(), read.state_dict())
    assert "0.weight" in model.state_dict()
    steps(accelerator, model, opt, range(2, 4))
    close(handle.state_dict(), alone())
    saving.remove()
    accelerator.save_state(str(folder("whole")))
    accelerator, model, again, opt = start()
    optx.integrations.accelerate.adapters_only(accelerator, again)
    accelerator.load_state(str(folder("fsdp2")))
    steps(accelerator, model, opt, range(2, 4))
    for p, q in zip(again.parameters(), handle.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())  # type: ignore[attr-defined]


# ---- Lightning --------------------------------------------------------------------------------------------


def lightning_fit(rank: int, name: str, strategy: Any, resume: Path | None = None) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    as_launched(rank)
    warnings.simplefilter("ignore")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.handle = adapted()

        def configure_model(self) -> None:
            if name == "model parallel":
                from torch.distributed.fsdp import fully_shard

                if not hasattr(self.handle.parameters()[0], "full_tensor"):
                    fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch.chunk(2)[rank]).square().mean()

        def configure_optimizers(self) -> Any:
            return optimizer(self.handle)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            optx.integrations.lightning.OptxCallback(module.handle),
            ModelCheckpoint(folder(name), save_top_k=-1, filename="{step}"),
        ],
    )  # fmt: skip

    trainer.fit(
        module,
        DataLoader(BATCHES[:2], batch_size=None),
        ckpt_path=resume,
        weights_only=False if resume else None,
    )
    return module


def _lightning_ddp(rank: int) -> None:
    whole = lightning_fit(rank, "lightning ddp", "ddp")
    close(whole.handle.state_dict(), alone())
    held = torch.load(folder("lightning ddp") / "step=2.ckpt", weights_only=True)
    assert "net.0.weight" not in held["state_dict"]
    assert len(held["optx_random_states"]) == 2
    again = lightning_fit(rank, "lightning ddp", "ddp", folder("lightning ddp") / "step=2.ckpt")
    assert all(map(torch.equal, again.handle.parameters(), whole.handle.parameters()))


def _lightning_fsdp2(rank: int) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.checkpoint import FileSystemReader

    def strategy() -> Any:
        return ModelParallelStrategy(2, 1)

    whole = lightning_fit(rank, "model parallel", strategy())
    close(whole.handle.state_dict(), alone())
    assert whole.trainer.optimizers[0].metrics()["optx/grad_norm"] > 0.0  # the callback asked on both
    file = folder("model parallel") / "step=2.ckpt"
    saved = FileSystemReader(file).read_metadata().state_dict_metadata
    assert "state_dict.net.0.optx.lora.A" in saved
    assert "state_dict.net.0.weight" not in saved
    again = lightning_fit(rank, "model parallel", strategy(), file)
    for p, q in zip(again.handle.parameters(), whole.handle.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())


test_accelerate = on_processes(2, _accelerate_ddp, _accelerate_fsdp2, together="accelerate")
test_lightning = pytest.mark.long(on_processes(2, _lightning_ddp, _lightning_fsdp2, together="lightning"))
