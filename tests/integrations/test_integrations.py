"""Other people's training loops: transformers' Trainer, Accelerate, Lightning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import batch, make_net, same, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import optx
from optx import AdamR, PerpGrad

STEPS = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def make(net: nn.Module, **options: Any) -> optx.Wrapped:
    base = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    return optx.wrap(base, PerpGrad(), AdamR(weight=0.05), **options)


# ---- transformers -----------------------------------------------------------------------------------------


class Tokens(Dataset[dict[str, Tensor]]):
    """The same sequences every time."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(13, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, steps: int, hft: bool = False) -> tuple[Any, Any]:
    from hft_models import llama
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    model = llama(2)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    more = [optx.HFT(model, rounds_every=4)] if hft else []
    opt = optx.wrap(base, PerpGrad(), AdamR(), *more)
    scheduler = get_cosine_schedule_with_warmup(opt, 2, STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        save_steps=3,
        save_strategy="steps",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    made = Trainer(model=model, args=arguments, train_dataset=Tokens(), optimizers=(opt, scheduler))
    return made, opt


@pytest.mark.parametrize("hft", [False, True], ids=["PerpGrad, AdamR", "and HFT"])
def test_trainer_resumes_as_if_uninterrupted(hft: bool, tmp_path: Path) -> None:
    whole, opt = trainer(tmp_path / "whole", STEPS, hft)
    start = copy.deepcopy(dict(whole.model.named_parameters()))
    whole.train()
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) >= STEPS - 1  # the schedule reached the base
    again, resumed = trainer(tmp_path / "again", STEPS, hft)
    with torch.no_grad():
        for p in again.model.parameters():
            p.add_(1.0)  # anchors must come from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    names = dict(again.model.named_parameters())
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, names[name]), name
        if p.requires_grad:
            assert torch.equal(resumed.slot(names[name], resumed.adamr, "anchor"), start[name]), name
    assert any(not torch.equal(p, start[n]) for n, p in whole.model.named_parameters())
    if hft:
        assert (opt.hft.round, resumed.hft.round) == (1, 1)
        frozen = [n for n, p in whole.model.named_parameters() if not p.requires_grad]
        assert frozen == [n for n, p in again.model.named_parameters() if not p.requires_grad]
        assert frozen


# ---- Accelerate -------------------------------------------------------------------------------------------


def loader(batches: int = 2 * STEPS) -> DataLoader[Any]:
    made = [batch(step) for step in range(batches)]
    data = TensorDataset(torch.cat([x for x, _ in made]), torch.cat([y for _, y in made]))
    return DataLoader(data, batch_size=16)


def accelerated(**options: Any) -> tuple[Any, nn.Module, Any, Any, Any, optx.Wrapped]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    net = make_net()
    opt = make(net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    return (accelerator, *accelerator.prepare(net, opt, loader(), scheduler), opt)


def accelerate_steps(accelerator: Any, net: Any, opt: Any, data: Any, scheduler: Any, numbers: range) -> None:
    for number, (x, y) in enumerate(data):
        if number in numbers:
            with accelerator.accumulate(net):
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                opt.step()
                scheduler.step()
                opt.zero_grad()


def by_hand() -> nn.Module:
    """What Accelerate should come to."""
    net = make_net()
    opt = make(net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    for number, (x, y) in enumerate(loader()):
        (nn.functional.cross_entropy(net(x), y) / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return net


def test_accelerate_accumulates_clips_and_schedules() -> None:
    accelerator, net, opt, data, scheduler, inner = accelerated()
    assert isinstance(opt.optimizer, optx.Wrapped)
    assert opt.optimizer is inner
    accelerate_steps(accelerator, net, opt, data, scheduler, range(2 * STEPS))
    assert same(accelerator.unwrap_model(net), by_hand())
    assert not opt.step_was_skipped


def test_accelerate_saves_and_loads_its_state(tmp_path: Path) -> None:
    parts = accelerated()
    accelerate_steps(*parts[:5], range(STEPS))
    parts[0].save_state(str(tmp_path / "state"))
    again = accelerated()
    with torch.no_grad():
        for p in again[1].parameters():
            p.mul_(2.0)
    again[0].load_state(str(tmp_path / "state"))
    accelerate_steps(*again[:5], range(STEPS, 2 * STEPS))
    assert same(again[0].unwrap_model(again[1]), by_hand())


def test_accelerate_puts_other_parameters_into_the_groups() -> None:
    """As on TPUs and under FSDP: prepare() maps each parameter to what the moved model has."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerated()  # its global state
    plain, old = make_net(), make_net()
    reference, inner = make(plain), make(old)
    train(plain, reference, range(4))
    train(old, inner, range(2))  # with state that has to go along
    opt = AcceleratedOptimizer(inner)
    new = make_net()
    new.load_state_dict(old.state_dict())
    opt._switch_parameters(dict(zip(old.parameters(), new.parameters(), strict=True)))
    train(new, opt, range(2, 4))
    assert same(new, plain)
    start = make_net()
    pairs = zip(new.parameters(), start.parameters(), strict=True)
    assert all(torch.equal(inner.slot(p, inner.adamr, "anchor"), a) for p, a in pairs)
    assert not set(inner.state) & set(old.parameters())


def test_accelerate_scales_gradients() -> None:
    """An overflow under Accelerate's own scaler: the step is skipped and counted as such."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerated()  # its global state
    net = make_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = AcceleratedOptimizer(make(net), scaler=scaler)
    before = copy.deepcopy(net)
    for factor, skipped in ((float("inf"), True), (1.0, False)):
        opt.zero_grad()
        x, y = batch(0)
        scaler.scale(factor * nn.functional.cross_entropy(net(x), y)).backward()
        opt.step()
        assert opt.step_was_skipped == skipped
        assert same(net, before) == skipped
    assert scaler.get_scale() == 32.0


# ---- Lightning --------------------------------------------------------------------------------------------


def lightning_run(folder: Path, epochs: int, manual: bool, checkpoint: Path | None = None) -> nn.Module:
    lightning = pytest.importorskip("lightning", minversion="2.4")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()
            self.automatic_optimization = not manual

        def configure_optimizers(self) -> Any:
            opt = make(self.net)
            scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
            return [opt], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, item: Any, index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(item[0]), item[1])
            if manual:
                opt = self.optimizers()
                assert isinstance(opt, optx.Wrapped)
                opt.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(opt, 0.5, "norm")
                opt.step()
                self.lr_schedulers().step()
            return loss

    module = Module()
    runner = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        gradient_clip_val=None if manual else 0.5,
    )
    runner.fit(module, loader(STEPS // 2), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    runner.save_checkpoint(folder / f"{epochs}.ckpt")
    return module.net


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning(manual: bool, tmp_path: Path) -> None:
    plain = make_net()
    opt = make(plain)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    for x, y in (*loader(STEPS // 2), *loader(STEPS // 2)):  # two epochs: Lightning resumes at a whole one
        opt.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step()
        scheduler.step()
    whole = lightning_run(tmp_path, 2, manual)
    assert same(whole, plain)
    lightning_run(tmp_path, 1, manual)
    resumed = lightning_run(tmp_path, 2, manual, tmp_path / "1.ckpt")
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
    anchors = [entry["optx.adamr.anchor"] for entry in saved["optimizer_states"][0]["state"].values()]
    assert all(torch.equal(a, p) for a, p in zip(anchors, make_net().parameters(), strict=True))
    assert same(resumed, plain)
