"""Folders of adapters for the tests: how they are written, read and refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import nn

import optx

OWN, CONFIG, TENSORS = "optx_adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"
ONE, TWO = optx.LoRA(rank=1), (optx.IA3(), optx.BitFit())


@dataclass(frozen=True)
class Both(optx.Composite):
    """Two methods as options of a third."""

    name: ClassVar[str] = "both"
    first: optx.Injection = ONE
    rest: tuple[optx.Injection, ...] = TWO

    def members(self) -> dict[str, optx.Injection]:
        return {"first": self.first, **{f"rest{i}": one for i, one in enumerate(self.rest)}}


def description(folder: Path) -> dict[str, Any]:
    [file] = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        return json.loads(opened.metadata()["optx"])


WHERE = {"first": "fc", "rest0": "conv|fc", "rest1": r"conv1|block\.\w+"}


def refuses(folder: Path, model: nn.Module, match: str, error: type[Exception] = optx.FileError) -> None:
    """The folder isn't attached, with that message; nothing is changed."""
    before = {key: t.clone() for key, t in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        optx.attach(model, folder)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
