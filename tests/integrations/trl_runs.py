"""TRL's SFTTrainer on a tiny Llama with an adapter and transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_runs import adapted, tokenizer, transforms
from trl import SFTConfig, SFTTrainer

import optx
from optx.integrations.transformers import OptxCallback


def texts(count: int, **more: Any) -> Any:
    """So many rows of five words, in the one column that is named."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 61, (count, 5), generator=draw).tolist()
    return Dataset.from_list([{next(iter(more)): " ".join(f"w{n}" for n in row)} for row in rows])


def config(kind: Any, folder: Path, **options: Any) -> Any:
    """Arguments of a trainer of TRL: four steps, saved after two."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    return kind(output_dir=str(folder), **given)


def sft(folder: Path, *callbacks: Any, **options: Any) -> tuple[Any, Any, optx.Handle]:
    """A trainer, its model, and what is attached to it."""
    model, handle = adapted()
    function = options.pop("compute_loss_func", None)
    made = SFTTrainer(
        model,
        config(SFTConfig, folder, gradient_accumulation_steps=2, max_length=8, **options),
        train_dataset=texts(16, text=None),
        processing_class=tokenizer(),
        callbacks=[OptxCallback(handle), *callbacks],
        optimizer_cls_and_kwargs=transforms(),
        compute_loss_func=function,
    )
    return made, model, handle
