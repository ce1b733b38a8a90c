"""One fine-tuning under Accelerate, for tests that interrupt it."""

from __future__ import annotations

import os
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optx

STEPS, SAVED, KILLED = 6, 4, 5  # of two epochs


def spoil(model: nn.Module) -> None:
    """Give all that trains other values."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 1.0)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two state dicts are one, bit for bit."""
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        map(torch.equal, states[0].values(), states[1].values())
    )


def fresh(**options: Any) -> Any:
    """An Accelerator that knows nothing of earlier ones."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(**{"cpu": True, **options})


class Run:
    """A Llama with LoRA, SAF as a second loss, accumulation, clipping and a schedule."""

    def __init__(self, **options: Any) -> None:
        from injections import llama

        self.accelerator = accelerator = fresh(gradient_accumulation_steps=2, **options)
        torch.manual_seed(7)
        model: Any = llama(1).train()
        self.handle = optx.attach(model, optx.LoRA(rank=2, dropout=0.1))
        optx.trainable_only(model, self.handle, also="model.norm")
        self.bare = model
        self.opt = self.optimizer()
        ids = torch.randint(3, 64, (2 * STEPS, 7), generator=torch.Generator().manual_seed(1))
        data = TensorDataset(torch.arange(len(ids)), ids)
        schedule = torch.optim.lr_scheduler.StepLR(self.opt, 2, 0.5)
        self.loss = optx.SAF(len(ids), start_epoch=0, lookback=1)
        self.model, self.stepper, self.data, self.schedule = accelerator.prepare(
            # Its own generator: the draw that begins an epoch must not move those of dropout.
            *(model, self.opt, DataLoader(data, batch_size=2, generator=torch.Generator()), schedule)
        )
        accelerator.register_for_checkpointing(self.loss)
        self.saving = optx.integrations.accelerate.adapters_only(accelerator, self.handle)

    def optimizer(self) -> optx.Wrapped:
        trained = [p for p in self.bare.parameters() if p.requires_grad]
        base = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        return optx.wrap(base, optx.PerpGrad(), optx.AdamR(weight=0.05))

    def train(self, folder: Path, start: int = 0, end: int = STEPS, kill: bool = False) -> Run:
        """From one step to another, saving in the middle of the second epoch."""
        accelerator = self.accelerator
        for step in range(start, end):
            if kill and step == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            epoch, place = divmod(2 * step, len(self.data))
            self.loss.set_epoch(epoch)
            for index, ids in islice(accelerator.skip_first_batches(self.data, place), 2):
                with accelerator.accumulate(self.model):
                    out = self.model(input_ids=ids, labels=ids)
                    accelerator.backward(out.loss + self.loss(out.logits[:, -1], index))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.stepper.step()
                    self.schedule.step()
                    self.stepper.zero_grad()
            if step + 1 == SAVED:
                accelerator.save_state(str(folder))
        return self
