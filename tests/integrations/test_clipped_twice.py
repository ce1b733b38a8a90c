"""A trainer that clips by the norm and `optx.Clip` beside it: told once, where the trainer is known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "are clipped twice, and Clip's norm is that of clipped ones"


def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from optx.integrations.transformers import OptxCallback, optimizer

    def args(limit: float) -> Any:
        return transformers.TrainingArguments(str(tmp_path), max_grad_norm=limit, use_cpu=True, report_to=[])

    with pytest.warns(
        UserWarning, match=rf"max_grad_norm is 1.0 .*Clip\(max_norm=2.0\), .*{WORDS}. Set it to 0"
    ):
        opt = optimizer(torch.optim.SGD, optx.Clip(2.0)).on(nn.Linear(2, 2), args(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(torch.optim.SGD, optx.Clip(2.0)).on(nn.Linear(2, 2), args(0.0))
    own = optx.wrap(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), optx.Clip())
    callback = OptxCallback(optimizer=own)
    made = transformers.Trainer(nn.Linear(2, 2), args(1.0), train_dataset=[0], callbacks=[callback])
    with pytest.warns(UserWarning, match=WORDS):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once an optimizer
        made.callback_handler.on_train_begin(made.args, made.state, made.control)
    assert opt.transforms[0].name == "clip"


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from optx.integrations.lightning import OptxCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return optx.wrap(torch.optim.SGD(self.parameters(), lr=0.1), optx.Clip(0.25))

    def fit(**options: Any) -> dict[str, Any]:
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            callbacks=[OptxCallback()],
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            **options,
        )
        torch.manual_seed(0)
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(torch.full((4, 2), 9.0), batch_size=2))
        return dict(trainer.callback_metrics)

    with pytest.warns(UserWarning, match=f"gradient_clip_val is 0.5 .*{WORDS}. Set it to None"):
        fit(gradient_clip_val=0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit()
    assert not [w for w in seen if "clipped twice" in str(w.message)]
