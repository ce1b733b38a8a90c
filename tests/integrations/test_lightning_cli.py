"""LightningCLI: optimizer, adapter and callback out of one YAML file, by `optx.from_config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optx

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse", reason="LightningCLI needs it")

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: FOLDER
  callbacks:
    - class_path: optx.integrations.lightning.OptxCallback
      init_args: {handle: handle, folders: true}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: end}
model:
  methods:
    attach: [{name: LoRA, rank: 2, targets: ["0"]}]
    trainable_only: true
    optimizer: {name: AdamW, lr: 0.05}
    transforms: [PerpGrad]
"""


def base() -> nn.Sequential:
    """Each time the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


class Module(LightningModule):
    """Made of a plain dict."""

    def __init__(self, methods: dict[str, Any]) -> None:
        super().__init__()
        self.net = base()
        made = optx.from_config(methods, model=self.net)
        self.made, (self.handle,) = made.optimizer, made.handles

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.made

    def train_dataloader(self) -> Any:
        return DataLoader([torch.ones(2, 6)] * 2, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_run_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["run"])
    cli = LightningCLI(Module, args=["fit", "--config", str(file)], save_config_callback=None)
    assert isinstance(cli.model.made, optx.Wrapped)
    assert "net.0.weight" not in torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    bare = base()
    read = optx.attach(bare, tmp_path / "end.adapter")
    assert all(map(torch.equal, read.parameters(), cli.model.handle.parameters()))
    assert any(p.any() for name, p in read.named_parameters() if name.endswith("B"))
    assert torch.equal(bare(torch.ones(2, 6)), cli.model.net(torch.ones(2, 6)))
