"""Columns of the table of engines that people train with, in one process: each runs the engine's own loop.

A row that brings its own backward pass (DSPReg, STN) runs it where the engine has a place for that: the
Trainer's ``training_step``, Lightning's manual optimization, Accelerate's loop, which is the user's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from engines.columns import Found, make, weights
from engines.language import collated, language
from engines.task import ADAMW, BATCH, STEPS, Batch, Task, train
from engines.tasks import BY_NAME
from processes import Team
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate


def _own_backward(task: Task) -> bool:
    return type(task).backward is not Task.backward


def _batches(task: Task) -> list[Batch]:
    return [task.batch(step) for step in range(STEPS)]


def _samples(task: Task) -> list[Batch]:
    return [{name: value[i] for name, value in one.items()} for one in _batches(task) for i in range(BATCH)]


def compiled(row: str, team: Team) -> Found:
    """`torch.compile` of the model, with the gradients' graph, run as torch's operations."""
    torch._dynamo.reset()  # a model's compiled code must not serve the next one
    task = make(row)
    opt = task.optimizer()
    train(task, torch.compile(task, backend="aot_eager"), opt)  # type: ignore[arg-type]
    return {"trained": weights(task)}


# ---- Accelerate --------------------------------------------------------------------------------------------


def accelerated(row: str, team: Team) -> Found:
    """Accelerate's documented loop."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    task = make(row)
    loader = DataLoader(_batches(task), batch_size=None)  # type: ignore[arg-type]
    call, opt, loader = accelerator.prepare(task, task.optimizer(), loader)
    for step, batch in enumerate(loader):
        task.begin(step)
        opt.zero_grad()
        task.backward(call, batch, opt.optimizer, accelerator.backward)
        opt.step()
        task.end(step, 0, 1)
    return {"trained": weights(task)}


# ---- the Trainer -------------------------------------------------------------------------------------------


def _trainer_class(base: Any, task: Task) -> Any:
    """A Trainer that keeps the samples' order, and has a row's own steps."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class Ordered(base):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class OwnStep(Ordered):
        def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
            opt = self.optimizer.optimizer  # of Accelerate's
            task.backward(model, self._prepare_inputs(inputs), opt, self.accelerator.backward)
            return torch.zeros(())

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            task.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            task.end(state.global_step - 1, 0, 1)

    return (OwnStep if _own_backward(task) else Ordered), Steps


def _arguments(kind: Any, folder: str, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        learning_rate=ADAMW["lr"],
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **more,
    )


def trainer(row: str, team: Team) -> Found:
    """transformers' Trainer, with optx's callback."""
    from transformers import Trainer, TrainingArguments

    from optx.integrations.transformers import OptxCallback

    task = make(row)
    kind, steps = _trainer_class(Trainer, task)
    with tempfile.TemporaryDirectory() as folder:
        made = kind(
            task,
            _arguments(TrainingArguments, folder),
            default_collate,
            train_dataset=_samples(task),
            optimizers=(task.optimizer(), None),
            callbacks=[OptxCallback(task.handle), steps()],
        )
        made.train()
    return {"trained": weights(task)}


# ---- SFTTrainer --------------------------------------------------------------------------------------------


def sft_trainer(row: str, team: Team) -> Found:
    """TRL's SFTTrainer of a Llama; the plain loop it is compared with is that of the same model."""
    from datasets import Dataset
    from trainer_runs import tokenizer
    from trl import SFTConfig, SFTTrainer

    from optx.integrations.transformers import OptxCallback, loss

    one = language(BY_NAME[row])
    task, plain = one.task(one), one.task(one)
    start = weights(plain)
    train(plain, plain, plain.optimizer(call=plain.net))
    kind, steps = _trainer_class(SFTTrainer, task)
    with tempfile.TemporaryDirectory() as folder:
        made = kind(
            task.net,
            _arguments(SFTConfig, folder, max_length=None, gradient_checkpointing=False),
            collated if row == "SAF" else None,  # TRL's own leaves the samples' numbers out
            train_dataset=Dataset.from_list(
                [{"input_ids": one["x"].tolist(), "index": int(one["index"])} for one in _samples(task)]
            ),
            processing_class=tokenizer(),
            optimizers=(task.optimizer(call=task.net), None),
            callbacks=[OptxCallback(task.handle), steps()],
            compute_loss_func=None if task.signal is None else loss(task.signal),
        )
        made.train()
    return {"trained": weights(task), "reference": {"start": start, "trained": weights(plain)}}


# ---- Lightning ---------------------------------------------------------------------------------------------


def lightning(row: str, team: Team) -> Found:
    """Lightning's Trainer, with optx's callback."""
    from lightning.pytorch import Trainer

    from optx.integrations.lightning import OptxCallback

    task = make(row)
    with tempfile.TemporaryDirectory() as folder:
        made = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[] if task.handle is None else [OptxCallback(task.handle)],
        )
        loader = DataLoader(_batches(task), batch_size=None)  # type: ignore[arg-type]
        made.fit(_lightning_module(task), loader)
    return {"trained": weights(task)}


def _lightning_module(task: Task) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.task = task
            self.automatic_optimization = not _own_backward(task)

        def configure_optimizers(self) -> Any:
            return task.optimizer()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            task.begin(batch_idx)

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            if self.automatic_optimization:
                return task(**batch)["loss"]
            opt: Any = self.optimizers()
            opt.zero_grad()
            task.backward(task, batch, opt.optimizer, self.manual_backward)
            opt.step()
            return None

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            task.end(batch_idx, 0, 1)

    return Module()


# ---- DeepSpeed ---------------------------------------------------------------------------------------------


def zero3(row: str, team: Team) -> Found:
    """Parameters that are marked as DeepSpeed's ``zero.Init`` marks them; there is no DeepSpeed in it."""
    one = BY_NAME[row]

    def marked() -> nn.Module:
        net = one.net()
        for number, p in enumerate(net.parameters()):
            p.ds_id = number  # type: ignore[attr-defined]
        return net

    task = one.task(dataclasses.replace(one, net=marked))
    task.optimizer()
    return {"trained": weights(task)}


COLUMNS: Mapping[str, Callable[[str, Team], Found]] = {
    "torch.compile (aot_eager)": compiled,
    "Trainer": trainer,
    "SFTTrainer": sft_trainer,
    "Accelerate": accelerated,
    "Lightning": lightning,
    "ZeRO-3 (its marks)": zero3,
}
