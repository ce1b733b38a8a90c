"""Losses of optx as a Trainer's compute_loss_func: accumulation, what they are told, and their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injections import bert, llama, no_dropout
from torch import nn
from torch.utils.data import Dataset

import optx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import Tokens, state, trainer

from optx.integrations.transformers import loss

pytestmark = pytest.mark.usefixtures("one_thread")


class Sentences(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": index % 2}


def still(model: nn.Module) -> nn.Module:
    no_dropout(model)
    return model


def run(folder: Path, function: Any, resumed: int | None = None, **options: Any) -> Any:
    """Two epochs of four steps on BERT."""
    given: dict[str, Any] = {
        "train_dataset": optx.with_index(Sentences()),
        "remove_unused_columns": False,
        "max_steps": 8,
        "callback": {},
        "optimizer_cls_and_kwargs": None,
        "learning_rate": 1e-3,
        **options,
    }
    model = given.pop("model", None) or still(bert())
    made = trainer(folder, model, compute_loss_func=function(model), **given)
    made.train(resume_from_checkpoint=resumed and str(folder / f"checkpoint-{resumed}"))
    return made


FUNCTIONS = {
    "SAF": lambda model: loss(optx.SAF(16, lookback=1, start_epoch=0)),
    "MESA": lambda model: loss(optx.MESA(model, beta=0.5, start_epoch=0)),
    "LossReweight": lambda model: loss(optx.LossReweight(warmup=3)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the model's own loss comes to."""
    options: dict[str, Any] = {"save_strategy": "no", "remove_unused_columns": True}
    return state(run(tmp_path_factory.mktemp("plain"), lambda _: None, **options).model)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_resumed_run_has_the_losses_state(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    """From step 6, in the second epoch, which depends on the first."""
    options = {"remove_unused_columns": name != "SAF"}
    whole = run(tmp_path, FUNCTIONS[name], save_steps=6, **options)
    again = run(tmp_path, FUNCTIONS[name], 6, save_steps=6, **options)
    wanted = state(whole.model)
    assert all(torch.equal(t, wanted[key]) for key, t in state(again.model).items())
    assert not all(torch.equal(t, wanted[key]) for key, t in plain.items())
    (tmp_path / "checkpoint-6" / "optx_losses.pt").unlink()
    with pytest.raises(optx.FileError, match=r"has no optx_losses.pt, the state of "):
        run(tmp_path, FUNCTIONS[name], 6, save_steps=6, **options)


@pytest.mark.parametrize("name", ["StableMax", "SAF", "MESA"])
def test_accumulated_batches_are_one_large_batch(name: str, tmp_path: Path) -> None:
    """Of sequences with different numbers of labels; SAF and MESA are a mean of them all."""
    made = []
    for size, count in ((8, 1), (2, 4)):
        model: Any = llama()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)  # so that outputs differ
        function = {
            "StableMax": lambda _: loss(optx.StableMaxCrossEntropy()),
            "SAF": lambda _: loss(optx.SAF(24, weight=0.0)),
            "MESA": lambda model: loss(optx.MESA(model, weight=0.0)),
        }[name]
        one = run(
            tmp_path,
            function,
            model=model,
            train_dataset=optx.with_index(Tokens()) if name == "SAF" else Tokens(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=2,
            save_strategy="no",
            learning_rate=1e-2,
        )
        made.append(one)
    wanted = state(made[0].model)
    for key, t in state(made[1].model).items():
        torch.testing.assert_close(t, wanted[key], rtol=1e-4, atol=1e-5)
    assert not torch.equal(wanted["model.norm.weight"], state(llama())["model.norm.weight"])
    a, b = (next(row["loss"] for row in one.state.log_history if "loss" in row) for one in made)
    assert a == pytest.approx(b, rel=1e-4)


def test_what_takes_its_place_is_what_by_hand_it_is() -> None:
    model: Any = llama()
    batch = Tokens()[3]
    ids, labels = batch["input_ids"][None], batch["labels"][None]
    outputs = model(input_ids=ids)
    found = loss(optx.StableMaxCrossEntropy())(outputs, labels)
    wanted = optx.stablemax_cross_entropy(outputs.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(found, wanted)
    z = optx.ZLoss(0.5, 2.0)
    torch.testing.assert_close(loss(z)(outputs, labels), z(outputs.logits[0, :-1], labels[0, 1:]))


def test_what_can_not_act_is_refused(tmp_path: Path) -> None:
    with pytest.raises(optx.OptxError, match="none of optx's losses"):
        loss(nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="this ZLoss has reduction='sum'"):
        loss(optx.ZLoss(reduction="sum"))
    with pytest.raises(optx.OptxError, match="ignore_index=5"):
        loss(optx.StableMaxCrossEntropy(ignore_index=5))
    options: dict[str, Any] = {"save_strategy": "no", "max_steps": 1}
    for more in ({}, {"callback": None}):  # at set-up, or at the first call
        with pytest.raises(optx.OptxError, match=r"label_smoothing_factor=0\.1 does not act"):
            run(
                tmp_path,
                lambda _: loss(optx.StableMaxCrossEntropy()),
                label_smoothing_factor=0.1,
                **options,
                **more,
            )
    with pytest.raises(optx.OptxError, match=r"the batch has no 'index'.*remove_unused_columns=False"):
        run(tmp_path, FUNCTIONS["SAF"], remove_unused_columns=True, **options)
    with pytest.raises(optx.OptxError, match=r"needs the batch.*OptxCallback\(\)"):
        run(tmp_path, FUNCTIONS["MESA"], callback=None, remove_unused_columns=True, **options)
    with pytest.warns(UserWarning, match="accumulate=1, and the Trainer accumulates 2"):
        run(
            tmp_path,
            FUNCTIONS["LossReweight"],
            gradient_accumulation_steps=2,
            remove_unused_columns=True,
            **options,
        )
