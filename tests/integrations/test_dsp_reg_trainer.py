"""DSP-Reg in the transformers Trainer: a training_step of a few lines, clipping, and a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

pytest.importorskip("transformers")

from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments


class Reader(PreTrainedModel):
    """A linear classifier that returns its loss, as the Trainer wants it."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(4, 3)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ByDomain(Trainer):
    """Each batch has both domains' samples, told apart by a column."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        label, losses = inputs.pop("domain"), []
        for d in (0, 1):
            with self.dsp.domain(d):
                part = {name: value[label == d] for name, value in inputs.items()}
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).mean()


def trainer(folder: Path, accumulation: int = 1, **options: Any) -> ByDomain:
    torch.manual_seed(0)
    model = Reader(PretrainedConfig())
    g = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(4, generator=g) * (1 + i % 2), "labels": i % 3, "domain": i % 2} for i in range(48)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    dsp = optx.DSPReg(2, weight=0.5, warmup=1, **options)
    opt = optx.wrap(torch.optim.AdamW(model.named_parameters(), lr=0.05), dsp)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.5,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    made = ByDomain(model, arguments, collate, train_dataset=data, optimizers=(opt, None))
    made.dsp = dsp
    return made


@pytest.mark.long
def test_the_trainer_steps_clips_and_resumes(tmp_path: Path) -> None:
    whole, again = trainer(tmp_path), trainer(tmp_path)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    found, resumed = whole.dsp.sensitivity(), again.dsp.sensitivity()
    assert list(found) == ["head.weight"]
    assert torch.equal(found["head.weight"], resumed["head.weight"])
    assert float(found["head.weight"].mean()) == pytest.approx(1.0, rel=1e-5)
    assert all(entry["grad_norm"] > 0.0 for entry in whole.state.log_history if "grad_norm" in entry)


def test_domains_in_the_inner_loop_of_an_accumulated_step(tmp_path: Path) -> None:
    """Batches of 8 in halves of 4; the last step of an epoch has fewer, and then all domains have."""
    whole = trainer(tmp_path / "whole")
    halves = trainer(tmp_path / "halves", 2, accumulate=True)
    for made in (whole, halves):
        made.args.max_steps, made.args.train_sampling_strategy = 3, "sequential"
        made.train()
    for a, b in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    found, wanted = halves.dsp.sensitivity(), whole.dsp.sensitivity()
    torch.testing.assert_close(found["head.weight"], wanted["head.weight"], rtol=1e-3, atol=1e-4)
    norms = [[e["grad_norm"] for e in made.state.log_history if "grad_norm" in e] for made in (whole, halves)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # clipping sees the mean over domains
    refused = trainer(tmp_path / "refused", 2)
    with pytest.raises(optx.OptxError, match=r"domain\(0\) came a second time.*or give accumulate=True"):
        refused.train()
    odd = trainer(tmp_path / "odd", 4, accumulate=True)  # 24 batches of 2 samples; 5 at a time leave 4
    odd.args.gradient_accumulation_steps, odd.args.train_sampling_strategy = 5, "sequential"
    odd.train()
    assert odd.state.global_step == 6
