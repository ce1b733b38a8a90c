"""Models to merge, as dicts and as folders, and the methods."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import optx

METHODS = [
    optx.TaskArithmetic(lam=0.4),
    optx.TIES(density=0.3),
    optx.TIES(density=0.3, convention="mergekit"),
    optx.DARELinear(p=0.5),
    optx.DARETIES(p=0.5, convention="mergekit"),
    optx.PCB(ratio=0.3),
    optx.PCB(ratio=0.3, score="paper"),
]


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "layer.weight": (6, 6), "layer.bias": (6,), "scale": ()}
    made = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return {**made, "steps": torch.tensor(seed), "mask": torch.tensor([True, False])}


def tuned(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.randn(t.shape, generator=g).to(t.dtype) if t.is_floating_point() else t.clone()
        for n, t in base.items()
    }


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Two shards with an index, and a configuration."""
    path.mkdir()
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, path / file)
    where = {n: file for file, part in files.items() for n in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text("{}")
    return path
