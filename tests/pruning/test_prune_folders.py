"""`optx.prune` on what is on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import optx


def test_a_file_is_pruned_into_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"embed_tokens.weight": torch.randn(9, 8), "layers.0.q.weight": torch.randn(8, 8).bfloat16()}
    save_file(state, tmp_path / "a.safetensors")
    masks = optx.prune(tmp_path / "a.safetensors", optx.Magnitude(), out=tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    assert list(masks) == ["layers.0.q.weight"]
    assert torch.equal(made["embed_tokens.weight"], state["embed_tokens.weight"])
    kept = state["layers.0.q.weight"] * masks["layers.0.q.weight"]
    assert torch.equal(made["layers.0.q.weight"], kept)
    assert optx.Masks.of(tmp_path / "b.safetensors") == masks
