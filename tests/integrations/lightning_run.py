"""One fine-tuning in Lightning, for tests that interrupt it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate_run import spoil
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import optx

STEPS, SAVED, KILLED = 6, 3, 5  # of two epochs


class Module(LightningModule):
    """A Llama with LoRA and a norm that trains whole, and a running average beside it."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        from injections import llama

        self.save_hyperparameters()
        torch.manual_seed(7)
        self.net: Any = llama(1).train()
        self.handle = optx.attach(self.net, optx.LoRA(rank=rank, dropout=0.1))
        optx.trainable_only(self.net, self.handle, also="model.norm")
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("constant", torch.ones(2))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.net(input_ids=batch[0], labels=batch[0]).loss
        with torch.no_grad():
            self.average.mul_(0.9).add_(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        base = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        opt = optx.wrap(base, optx.PerpGrad(), optx.AdamR(weight=0.05))
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killed(Callback):
    """SIGKILL at the start of a step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def loader() -> DataLoader[Any]:
    ids = torch.randint(3, 64, (2 * STEPS, 7), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(ids), batch_size=2, shuffle=True)


def trainer(folder: Path, *callbacks: Any, saves: bool = True, **options: Any) -> Trainer:
    """A quiet one, which saves after each epoch."""
    if saves:
        callbacks = (*callbacks, ModelCheckpoint(folder, save_top_k=-1, save_last=True))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{
            **quiet,
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "enable_checkpointing": saves,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **options,
        }
    )


def run(folder: Path, *callbacks: Any, resume: Path | None = None) -> Module:
    """From the start or from a checkpoint to the end."""
    module = Module()
    if resume is not None:
        torch.manual_seed(0)  # other draws than at the start of the first run
        spoil(module)
    held = optx.integrations.lightning.OptxCallback(module.handle, folders=True)
    trainer(folder, *callbacks, held).fit(
        module, loader(), ckpt_path=resume, weights_only=True if resume else None
    )
    return module
