"""Self-tuning networks beside torch's own machinery and the Trainer, and what a run needs to go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import move
from stn_loop import batch, frozen, mlp, noisy, sgd, train_step, tuned, valid_step
from torch import Tensor, nn
from torch.nn import functional as F

import optx


def test_autocast_and_a_scaler() -> None:
    model = mlp()
    stn = tuned(model)
    opt, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        x, y = batch(step)
        with stn.train_batch(x), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(noisy(stn, x)).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        opt.zero_grad()
        with stn.valid_batch(x), torch.autocast("cpu", torch.bfloat16):
            scaler.scale(F.cross_entropy(model(x).float(), y)).backward()
        grad = stn.hparams.raw.grad
        assert grad is not None
        assert grad.dtype == torch.float32
        raw = frozen(stn)[0]
        if step == 1:
            grad[0] = float("inf")
        stn.step_hparams(scaler)
        assert torch.equal(raw, stn.hparams.raw) == (step == 1)
        scaler.update()
    assert scaler.get_scale() == 4.0


def test_the_scaler_is_divided_out() -> None:
    rows: list[Tensor] = []
    for scale in (None, 1024.0):
        model = mlp()
        stn = tuned(model)
        train_step(model, stn, sgd(model), 0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        x, y = batch(1)
        with stn.valid_batch(x):
            loss = F.cross_entropy(model(x), y)
            (scaler.scale(loss) if scaler else loss).backward()
        with torch.no_grad():
            stn._prepare_gradients(scaler)
        rows.append(torch.stack([p.grad for p in (stn.hparams.raw, stn.hparams.raw_sigma)]))  # type: ignore
    torch.testing.assert_close(*rows)


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("delta", [False, True])
def test_compiled_whole(delta: bool) -> None:
    torch._dynamo.reset()
    models = [mlp(), mlp()]
    calls: list[Any] = [models[0], torch.compile(models[1], fullgraph=True, backend="aot_eager")]
    stns = [tuned(model, delta=delta) for model in models]
    models[1].load_state_dict(models[0].state_dict())
    for stn in stns:
        stn.hparams.read.add("noise")
    for step in range(3):
        x, y = batch(step)
        losses: list[Tensor] = []
        for model, call, stn in zip(models, calls, stns, strict=True):
            torch.manual_seed(step)
            with stn.train_batch(x):
                F.cross_entropy(call(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad if p.grad is not None else 0)
                    p.grad = None
            with stn.valid_batch(x):
                loss = F.cross_entropy(call(x), y)
                loss.backward()
            losses.append(loss.detach())
            stn.step_hparams()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stns[0].hparams.raw, stns[1].hparams.raw, rtol=1e-4, atol=1e-5)


def test_the_transformers_trainer(tmp_path: Any) -> None:
    """BERT's own dropout modules, by the Trainer's own training step within a batch."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, attn_implementation="eager",
        )
    )  # fmt: skip
    hparams = optx.HParams(drop=optx.hp(0.1, (0, 0.9)))
    stn = optx.attach(
        model,
        optx.STN(hparams, delta=True, dropout="drop", warmup=1, train_steps=1),
        r".*(intermediate|output)\.dense",
    )
    data = [{"input_ids": torch.randint(32, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    held_out = {key: torch.stack([one[key] for one in data[:8]]) for key in data[0]}

    class SelfTuned(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            with stn.train_batch(inputs["labels"]):
                loss = super().training_step(model, inputs, *rest)
            for _ in range(stn.due):
                with stn.valid_batch(held_out["labels"]):
                    model(**held_out).loss.backward()
                stn.step_hparams()
            return loss

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"layer\.0\.attention\.self\.dropout' was not called"):
        SelfTuned(model, arguments, train_dataset=data).train()  # its p is read by the attention function
    assert len(stn.history["drop"]) == 4
    assert hparams.values()["drop"] != pytest.approx(0.1, abs=1e-6)


def test_copies_have_hyperparameters_of_their_own() -> None:
    model = mlp()
    stn = tuned(model)
    twin, copied = copy.deepcopy((model, stn))
    for step in range(2):
        train_step(model, stn, sgd(model), step)
        valid_step(model, stn, step)
    assert copied.hparams.values()["drop"] == pytest.approx(0.2)
    assert twin[0].optx.stn.hparams is copied.hparams
    assert copied.optimizer.param_groups[0]["params"][0] is copied.hparams.raw
    train_step(twin, copied, sgd(twin), 0)
    valid_step(twin, copied, 0)
    assert copied.hparams.values()["drop"] != pytest.approx(0.2, abs=1e-6)


# ---- state ----------------------------------------------------------------------------------------------


def go_on(model: nn.Module, stn: optx.SelfTuning, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        train_step(model, stn, opt, step)
        for _ in range(stn.due):
            valid_step(model, stn, step)


@pytest.mark.parametrize("cut", [1, 4, 5, 8])
@pytest.mark.parametrize("options", [{}, {"delta": True, "sigma_lr": 0.0}], ids=str)
def test_a_resumed_run_is_bit_identical(cut: int, options: dict[str, Any], tmp_path: Path) -> None:
    """In the warm-up, in the middle of a turn, and before a step that is due."""
    chosen = {"warmup": 3, "train_steps": 2, "valid_steps": 2, **options}

    def start() -> tuple[nn.Module, optx.SelfTuning, torch.optim.Optimizer]:
        model = mlp()
        stn = tuned(model, **chosen)
        return model, stn, sgd(model)

    whole, stn, opt = start()
    go_on(whole, stn, opt, range(12))
    broken, half, opt = start()
    go_on(broken, half, opt, range(cut))
    half.optimizer.param_groups[0]["lr"] *= 1.0
    torch.save([broken.state_dict(), half.state_dict(), opt.state_dict()], tmp_path / "run.pt")
    again, other, opt = start()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for part, state in zip((again, other, opt), saved, strict=True):
        part.load_state_dict(state)
    go_on(again, other, opt, range(cut, 12))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())
    assert stn.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in stn.state_dict().items())
    assert stn.history == other.history
    assert len(stn.history["drop"]) == 9


def test_a_step_that_is_due_is_due_after_a_resume() -> None:
    model = mlp()
    stn = tuned(model, train_steps=1)
    train_step(model, stn, sgd(model), 0)
    twin = mlp()
    other = tuned(twin, train_steps=1, lr=1.0)
    other.load_state_dict(stn.state_dict())
    twin.load_state_dict(model.state_dict())
    assert other.due == 1
    assert other.optimizer.param_groups[0]["lr"] == 3e-3
    for one, of in ((stn, model), (other, twin)):
        valid_step(of, one, 0)
    assert torch.equal(stn.hparams.raw, other.hparams.raw)


def test_a_state_of_others_is_refused_and_changes_nothing() -> None:
    stn = tuned(mlp())
    move(stn)
    state = {key: t.clone() for key, t in stn.state_dict().items()}
    other = tuned(mlp())
    before = {key: t.clone() for key, t in other.state_dict().items()}
    for change, says in (
        (lambda s: s.pop("optx.stn.adam"), r"'optx\.stn\.adam' is missing"),
        (lambda s: s.pop("0.stn.V"), r"'0\.stn\.V' is missing"),
        (lambda s: s.update({"optx.stn.raw": torch.ones(3)}), r"has shape \(3,\), the model needs \(2,\)"),
        (lambda s: s.update({"optx.stn.more": torch.ones(3)}), "has no place in this model"),
        (lambda s: s.update({"optx.stn.history": torch.ones(0, 5)}), r"has shape \(0, 5\)"),
    ):
        broken = dict(state)
        change(broken)
        with pytest.raises(optx.FileError, match=says):
            other.load_state_dict(broken)
    renamed = optx.HParams(drop=optx.hp(0.2, (0, 0.9)), loud=optx.hp(0.1, (0, None)))
    third = optx.attach(mlp(), optx.STN(renamed, dropout="drop"))
    with pytest.raises(optx.FileError, match=r'it is of the hyperp.*"noise".*this handle has .*"loud"'):
        third.load_state_dict(state)
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    other.load_state_dict(state)
    assert all(torch.equal(t, state[key]) for key, t in other.state_dict().items())


def test_a_folder_has_the_values_that_are_in_force(tmp_path: Path) -> None:
    model = mlp()
    stn = tuned(model)
    for step in range(3):
        train_step(model, stn, sgd(model), step)
        valid_step(model, stn, step)
    stn.save(tmp_path / "stn")
    fresh = mlp()
    fresh.load_state_dict(model.state_dict(), strict=False)
    again = optx.attach(fresh, tmp_path / "stn")
    assert isinstance(again, optx.SelfTuning)
    assert again.hparams.values() == stn.hparams.values()
    x = batch(0)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert [row.module for row in again.report().rows] == [row.module for row in stn.report().rows]
    other = tuned(mlp())
    other.load(tmp_path / "stn")
    assert torch.equal(other.hparams.raw, stn.hparams.raw)
    assert torch.equal(other.hparams.raw_sigma, stn.hparams.raw_sigma)
    renamed = optx.HParams(drop=optx.hp(0.2, (0, 0.9)), loud=optx.hp(0.1, (0, None)))
    third = optx.attach(mlp(), optx.STN(renamed, dropout="drop"))
    with pytest.raises(optx.FileError, match=r"is of HParams\(drop.*noise.*this handle of HParams\(.*loud"):
        third.load(tmp_path / "stn")
