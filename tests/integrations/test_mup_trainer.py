"""MuAdamW in the transformers Trainer with a schedule of one's own, resumed, and in Accelerate's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

pytest.importorskip("transformers")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

LR, DECAY = 3e-3, 0.1
# What these train multiplies no output: the rules of its groups are looked at, not what it learns.
pytestmark = pytest.mark.filterwarnings("ignore:.*no optx.MuReadout does:UserWarning")


def llama(width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    return LlamaForCausalLM(config)


def begin(model: nn.Module) -> tuple[Any, Any]:
    shapes = optx.scaling.shapes(model, base=llama(16))
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    opt = optx.wrap(opt, optx.MuAdamW(shapes))
    return opt, get_cosine_schedule_with_warmup(opt, 2, 8)


def trainer(folder: Path, steps: int) -> Trainer:
    model = llama()
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 32, (8,), generator=rng) for _ in range(32)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, optimizers=begin(model))


def test_the_trainer_resumes_what_it_saved(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    again = trainer(tmp_path / "again", 8)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    rates = [row["learning_rate"] for row in whole.state.log_history if "learning_rate" in row]
    assert rates[2] == pytest.approx(LR)  # the first group's, which is the base model's
    assert [g["optx.mu.lr"] for g in again.optimizer.param_groups] == [1.0, 0.25]


def test_accelerates_loop() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = llama()
    opt, schedule = begin(model)
    model, opt, schedule = accelerator.prepare(model, opt, schedule)
    x = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=x, labels=x).loss)
            opt.step()
            schedule.step()
            opt.zero_grad()
    first, second = (g["lr"] for g in opt.param_groups)
    assert second == pytest.approx(first / 4)
    assert first < LR
