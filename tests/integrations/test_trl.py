"""TRL's SFTTrainer and GRPOTrainer, unchanged, with adapters and transforms: checkpoints, logs, resuming."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import optx

pytest.importorskip("trl")

from trainer_runs import adapted, state, tokenizer, transforms
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from optx.integrations.transformers import OptxCallback, loss

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count: int, **more: Any) -> Any:
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 61, (count, 5), generator=draw).tolist()
    return Dataset.from_list([{next(iter(more)): " ".join(f"w{n}" for n in row)} for row in rows])


def config(kind: Any, folder: Path, **options: Any) -> Any:
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


def sft(folder: Path, **options: Any) -> tuple[Any, Any, optx.Handle]:
    model, handle = adapted()
    function = options.pop("compute_loss_func", None)
    made = SFTTrainer(
        model,
        config(SFTConfig, folder, gradient_accumulation_steps=2, max_length=8, **options),
        train_dataset=texts(16, text=None),
        processing_class=tokenizer(),
        callbacks=[OptxCallback(handle)],
        optimizer_cls_and_kwargs=transforms(),
        compute_loss_func=function,
    )
    return made, model, handle


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def grpo(folder: Path) -> tuple[Any, Any, optx.Handle]:
    model, handle = adapted()
    args = config(GRPOConfig, folder, num_generations=2, max_completion_length=4)
    made = GRPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=texts(8, prompt=None),
        processing_class=tokenizer(),
        callbacks=[OptxCallback(handle)],
        optimizers=(transforms().on(model, args), None),  # it takes no optimizer_cls_and_kwargs
    )
    return made, model, handle


@pytest.mark.parametrize("made_by", [sft, grpo], ids=["SFTTrainer", "GRPOTrainer"])
def test_trl_trains_logs_saves_and_resumes(made_by: Any, tmp_path: Path) -> None:
    whole, model, handle = made_by(tmp_path)
    whole.train()
    files = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert not files & {"model.safetensors", "config.json"}
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert all(row["optx/lr"] >= 0 and row["lora/trainable"] == 224 for row in rows)
    again, other, _ = made_by(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted = state(model)
    assert all(torch.equal(t, wanted[name]) for name, t in state(other).items())
    assert not all(torch.equal(t, wanted[name]) for name, t in state(adapted()[0]).items())
    handle.remove()
    optx.attach(model, tmp_path / "checkpoint-4")


def test_sft_takes_a_loss_of_ours(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a TRL to come will have no compute_loss_func
        function = loss(optx.StableMaxCrossEntropy())
        made, model, _ = sft(tmp_path, compute_loss_func=function, save_strategy="no", max_steps=2)
    made.train()
    start = state(adapted()[0])
    assert not all(torch.equal(t, start[name]) for name, t in state(model).items())
