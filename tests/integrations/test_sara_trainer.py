"""SaRA in the transformers Trainer and in Accelerate: accumulation, clipping, logging and a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import GradientState
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments


class Reader(PreTrainedModel):
    """Two layers that return their loss, as the Trainer wants it."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader(PretrainedConfig())


def trainer(folder: Path, compact: bool) -> Trainer:
    model, g = reader(), torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=g), "labels": i % 3} for i in range(48)]
    base = torch.optim.AdamW(model.named_parameters(), lr=0.005)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1e-3,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    opt = optx.wrap(base, optx.SaRA(fraction=0.3, reselect_at=4, compact=compact))
    return Trainer(model, arguments, train_dataset=data, optimizers=(opt, None))


def test_trainer_clips_what_is_selected_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path, compact=True)
    whole.train()
    norms = [log["grad_norm"] for log in whole.state.log_history if "grad_norm" in log]
    assert len(norms) == 6
    assert min(norms) > 1e-3
    resumed = trainer(tmp_path, compact=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    opt: Any = resumed.optimizer
    assert getattr(opt, "optimizer", opt).sara.steps == 6


def test_accelerate_accumulates_and_clips_as_a_plain_loop_does() -> None:
    GradientState._reset_state()  # a Trainer's, which all Accelerators of a process share
    ran: list[Reader] = []
    for plain in (True, False):
        model = reader()
        opt: Any = optx.wrap(
            torch.optim.AdamW(model.parameters(), lr=0.05), optx.SaRA(fraction=0.3, compact=True)
        )
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        y = torch.arange(8) % 3
        if plain:
            for _ in range(4):
                opt.zero_grad()
                for part in (0, 1):
                    (model(x[part::2], y[part::2])["loss"] / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                opt.step()
        else:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, opt = accelerator.prepare(model, opt)
            for _ in range(4):
                for part in (0, 1):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(x[part::2], y[part::2])["loss"])
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), 1e-3)
                        opt.step()
                        opt.zero_grad()
        ran.append(model)
    for p, q in zip(ran[0].parameters(), ran[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert not all(torch.equal(p, q) for p, q in zip(ran[0].parameters(), reader().parameters(), strict=True))
