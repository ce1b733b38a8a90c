"""Tensors of more numbers than a piece has: read by pieces, and merged as mergekit merges them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_yaml_cases import ours, within_ulps
from safetensors.torch import save_file

from optx._buffers import PIECE
from optx.delta._checkpoint_source import Files

yaml: Any = pytest.importorskip("yaml")
BASE = "base_model: base, models: [{model: a}, {model: b}]"
MERGES: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": (
        "models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.9}}]",
        {},
        0,
    ),
    "slerp": ("base_model: base, models: [{model: a}], parameters: {t: 0.3}", {"t": 0.3}, 0),
    "nearswap": ("base_model: base, models: [{model: a}], parameters: {t: 0.01}", {"t": 0.01}, 0),
    "task_arithmetic": (f"{BASE}, parameters: {{weight: 0.7}}", {"weight": [0.7, 0.7]}, 0),
    "ties": (
        f"{BASE}, parameters: {{weight: 0.7, density: 0.2, rescale: true}}",
        {"weight": [0.7, 0.7], "density": [0.2, 0.2], "rescale": True},
        4,  # of another order of summation of the norms
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("large")
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(1100, 1000, generator=draws)
    for name in ("base", "a", "b"):
        own = base if name == "base" else base + 0.1 * torch.randn(base.shape, generator=draws)
        (found / name).mkdir()
        save_file({"w": own}, found / name / "model.safetensors")
    return found


@pytest.mark.parametrize("method", MERGES)
def test_by_pieces(method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("mergekit.merge_methods")
    monkeypatch.chdir(place)
    sizes, piece, read = list[int](), Files.piece, Files.read

    def noted(self: Files, name: str, begin: int, end: int) -> torch.Tensor:
        sizes.append(end - begin)
        return piece(self, name, begin, end)

    def whole(self: Files, name: str) -> torch.Tensor:
        sizes.append(self.entries[name].numel)
        return read(self, name)

    monkeypatch.setattr(Files, "piece", noted)
    monkeypatch.setattr(Files, "read", whole)
    text, parameters, ulps = MERGES[method]
    made = ours(f"{{merge_method: {method}, {text}}}", tmp_path / "out")["w"]
    assert max(sizes) == PIECE
    names = ["a", "b"] if method == "linear" else ["base", "a"] if "t" in parameters else ["base", "a", "b"]
    from safetensors.torch import load_file

    models = [load_file(place / name / "model.safetensors") for name in names]
    if method == "linear":
        parameters = {"weight": [0.3, 0.9]}
    other = peer.merge_state_dicts(
        models, method, base=None if method == "linear" else 0, parameters=parameters
    )["w"]
    assert within_ulps(ulps)(made, other) if ulps else torch.equal(made, other)
