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
from trl import GRPOConfig, GRPOTrainer
from trl_runs import config, sft, texts

from optx.integrations.transformers import OptxCallback, loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
