"""A tiny Llama under transformers' Trainer, alone or with an adapter."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from injections import llama
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import optx
from optx.integrations.transformers import OptxCallback, optimizer


class Tokens(Dataset[dict[str, Tensor]]):
    """The same sequences every time; of some, the end counts for nothing."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[5 + index % 4 :] = -100
        return {"input_ids": ids, "labels": labels}


class Killed(TrainerCallback):
    """As by the kernel, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def tokenizer() -> Any:
    """Of as many words as the models of `injections` know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(61))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def adapted(injection: Any = None, **options: Any) -> tuple[Any, optx.Handle]:
    """A Llama with an adapter, dropout in it, that alone trains."""
    model = llama()
    torch.manual_seed(1)
    handle = optx.attach(model, injection or optx.LoRA(rank=2, dropout=0.1), **options)
    optx.trainable_only(model, handle)
    return model, handle


def transforms() -> Any:
    return optimizer(torch.optim.AdamW, optx.PerpGrad(), optx.AdamR(weight=0.05))


def trainer(folder: Path | str, model: nn.Module, *handles: optx.Handle, **options: Any) -> Trainer:
    """With the callback, if there are handles or ``callback`` has its options."""
    kind = options.pop("kind", Trainer)
    own = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    for name in ("compute_loss_func", "callbacks", "optimizer_cls_and_kwargs", "model_init"):
        if name in options:
            own[name] = options.pop(name)
    callback = options.pop("callback", None)
    if handles or callback is not None:
        own["callbacks"] = [*own.get("callbacks", []), OptxCallback(handles or None, **(callback or {}))]
    own = {"train_dataset": Tokens(), "optimizer_cls_and_kwargs": transforms(), **own}
    made = kind(model=model, args=arguments(folder, **options), **own)
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}
