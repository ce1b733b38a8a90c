"""Other people's loops around attached models: transformers' Trainer, Accelerate, Lightning, DDP, FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import sharded_adapters
import torch
from injections import ROWS, Row, llama, run
from processes import on_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import optx

BY_LABEL = {row.label: row for row in ROWS}


pytestmark = pytest.mark.usefixtures("one_thread")


class Sentences(Dataset[dict[str, Tensor]]):
    """Token lists of two classes: the second has larger token numbers."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = index % 2
        ids = torch.randint(3 + 30 * label, 33 + 30 * label, (7,), generator=generator)
        return {"input_ids": ids, "labels": torch.tensor(label)}


def trainer(folder: Path, steps: int, model: nn.Module) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",  # a resumed run must see the same rates
        save_steps=3,
        save_only_model=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        logging_strategy="no",
        dataloader_num_workers=0,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences())


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("label", ["LoRA, BERT", "SVFit", "MAM", "IAA", "BitFit"])
def test_trainer_trains_and_resumes(label: str, tmp_path: Path) -> None:
    row = BY_LABEL[label]

    def start() -> tuple[nn.Module, optx.Handle]:
        model = row.model().train()
        handle = row.attach(model, modules_to_save=["classifier"])
        optx.trainable_only(model, handle)
        return model, handle

    whole, handle = start()
    bare = {name: p.clone() for name, p in row.model().named_parameters()}
    trainer(tmp_path / "whole", 6, whole).train()
    for name, p in whole.named_parameters():
        if name in bare and not name.startswith("classifier"):
            assert torch.equal(p, bare[name])
    assert all(p.requires_grad for p in handle.parameters())

    first, _ = start()
    trainer(tmp_path / "parts", 3, first).train()
    second, resumed = start()
    trainer(tmp_path / "parts", 6, second).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3")
    )
    for key, tensor in handle.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


@pytest.mark.parametrize("label", ["LoRA", "PrefixTuning", "IAA, Llama"])
def test_accelerate(label: str) -> None:
    from accelerate import Accelerator

    row = BY_LABEL[label]
    model = row.model()
    handle = row.attach(model)
    optx.trainable_only(model, handle)
    accelerator = Accelerator(cpu=True)
    ids = torch.randint(3, 64, (8, 7))
    opt = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    prepared, opt, loader = accelerator.prepare(model, opt, DataLoader(TensorDataset(ids), batch_size=4))
    losses = []
    for _ in range(4):
        for (batch,) in loader:
            loss = prepared(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    unwrapped = accelerator.unwrap_model(prepared)
    handle.remove()
    assert torch.equal(run(unwrapped), run(row.model()))


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    model = llama()
    handle = optx.attach(model, optx.LoRA(rank=2))
    optx.trainable_only(model, handle)
    before = {key: t.clone() for key, t in handle.state_dict().items()}

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.model(input_ids=batch[0], labels=batch[0]).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(handle.parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.randint(3, 64, (8, 7))), batch_size=4)
    trainer.fit(Module(), loader)
    assert all(not torch.equal(t, before[key]) for key, t in handle.state_dict().items())


# ---- two processes ----------------------------------------------------------------------------------------


def _batch(rank: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids, labels = torch.randint(3, 64, (8, 7), generator=generator), torch.arange(8) % 2
    part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return ids[part], labels[part]


def _train(call: Any, handle: optx.Handle, rank: int | None) -> dict[str, Tensor]:
    opt = torch.optim.SGD(handle.parameters(), lr=0.05)
    ids, labels = _batch(rank)
    for _ in range(3):
        opt.zero_grad()
        call(input_ids=ids, labels=labels).loss.backward()
        opt.step()
    return {key: t.clone() for key, t in handle.state_dict().items()}


def _fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for label in ("LoRA, BERT", "Perp"):
        _sharded(BY_LABEL[label], rank, fully_shard)


def _sharded(row: Row, rank: int, fully_shard: Any) -> None:
    alone, handle = row.attached()
    optx.trainable_only(alone, handle)
    wanted = _train(alone, handle, None)
    model, handle = row.attached()
    optx.trainable_only(model, handle)
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    _train(model, handle, rank)
    found = {name: p.full_tensor() for name, p in model.named_parameters() if ".optx." in name}  # type: ignore[attr-defined]
    whole = {name: p for name, p in alone.named_parameters() if ".optx." in name}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
    assert wanted


def _adapters(rank: int) -> None:
    sharded_adapters.every_case(rank, Path(os.environ["OPTX_TEST_FOLDER"]))


# Under DDP every injection is in tests/engines.
test_on_two_processes = on_processes(2, _fsdp, _adapters)
