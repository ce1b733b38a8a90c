"""Models that several tests read."""

from __future__ import annotations

from pathlib import Path

import merge_yaml_cases
import pytest
import torch
from adapter_models import llama
from delta_cases import normal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded Llama and what it became."""
    place = tmp_path_factory.mktemp("models")
    model = llama()
    model.save_pretrained(place / "base", max_shard_size="10KB")
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=number))
    model.save_pretrained(place / "tuned", max_shard_size="10KB")
    assert len(list((place / "base").glob("*.safetensors"))) > 2
    return place / "base", place / "tuned"


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Llamas of four layers: base, a, b and c."""
    return merge_yaml_cases.folders(tmp_path_factory.mktemp("llamas"), "Llama", "base a b c")
