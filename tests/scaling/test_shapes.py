"""`optx.scaling.shapes` on plain modules: what is width, and how much wider."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import optx
from optx.scaling import Shapes, Width


def mlp(width: int, depth: int = 1) -> nn.Sequential:
    hidden = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.LayerNorm(width), nn.Linear(width, 3))


def test_an_mlp() -> None:
    shapes = optx.scaling.shapes(mlp(64), base=mlp(16))
    kinds = {name: (width.kind, width.fan_in, width.fan_out, width.m) for name, width in shapes.items()}
    assert kinds == {
        "0.weight": ("input", 1.0, 4.0, 4.0),
        "0.bias": ("vector", 1.0, 4.0, 4.0),
        "1.weight": ("matrix", 4.0, 4.0, 4.0),
        "1.bias": ("vector", 1.0, 4.0, 4.0),
        "2.weight": ("vector", 1.0, 4.0, 4.0),
        "2.bias": ("vector", 1.0, 4.0, 4.0),
        "3.weight": ("output", 4.0, 1.0, 4.0),
        "3.bias": ("scalar", 1.0, 1.0, 1.0),
    }
    assert shapes["1.weight"] == Width("1.weight", (64, 64), (16, 16), "matrix", 4.0, 4.0, (), (16, 16))


def test_a_file_gives_them_back_and_serves_another_target(tmp_path: Path) -> None:
    shapes = optx.scaling.shapes(mlp(64), base=mlp(16)).set(input="3.weight")
    shapes.save(tmp_path / "shapes.json")
    again = Shapes.load(tmp_path / "shapes.json")
    assert again == shapes
    wider = optx.scaling.shapes(mlp(128), base=tmp_path / "shapes.json")
    assert (wider["1.weight"].m, wider["3.weight"].kind, wider["3.weight"].m) == (8.0, "input", 8.0)
    same = optx.scaling.shapes(mlp(16), base=shapes)
    assert [width.kind for width in same.values()] == [width.kind for width in shapes.values()]
    assert {width.m for width in same.values()} == {1.0}


def test_depth_that_differs_is_named() -> None:
    with pytest.raises(optx.OptxError, match=r"base has no parameter '4.weight'"):
        optx.scaling.shapes(mlp(64, depth=2), base=mlp(16))
