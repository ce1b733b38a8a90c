"""Every format that optx reads: some good files, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mutations
import torch
from safetensors.torch import save_file
from torch import nn

import optx
from optx.delta._checkpoint_source import Files
from optx.delta._mergekit import read_config


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        make: writes good files into a folder.
        mutate: by the file's name, what makes it wrong; the others stay as they are.
        read: everything that is in a folder.
    """

    make: Callable[[Path], None]
    mutate: Mapping[str, mutations.Mutate]
    read: Callable[[Path], object]


def _weights(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "model.layers.0.weight", "lm_head.weight")
    made = {name: torch.randn(6, 4, generator=g) for name in names}
    made["half"] = torch.randn(7, generator=g).to(torch.bfloat16)
    made["small"] = torch.randn(5, generator=g).to(torch.float8_e5m2)
    return {
        **made,
        "steps": torch.tensor([3]),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


def _read_all(source: Files) -> None:
    for name, entry in source.entries.items():
        source.read(name)
        source.head(name, 3)
        source.piece(name, 0, entry.numel)
        if entry.dtype.is_floating_point:
            source.fingerprint(name)


def _make_index(folder: Path) -> None:
    tensors = _weights(0)
    names = list(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "sub/model-00002-of-00002.safetensors": names[1::2],
    }
    (folder / "sub").mkdir()
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    where = {n: file for file, part in files.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "x", "tie_word_embeddings": True, "a": [1]})
    )


def _read_index(folder: Path) -> None:
    source = Files(folder)
    _read_all(source)
    source.config()


def _deltas(folder: Path) -> None:
    names = {"weight", "other"}
    base = {name: torch.zeros(40, 30) for name in names} | {"steps": torch.tensor([1])}
    g = torch.Generator().manual_seed(0)
    tuned = {n: t + torch.randn(t.shape, generator=g) if n != "steps" else t for n, t in base.items()}
    delta = optx.Delta.between(base, tuned)
    both = delta.subset("weight|steps").dare(0.95) + delta.subset("other").structural(0.9)
    both.save(folder / "delta.safetensors")


def _compeft(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"a": torch.zeros(50, 30), "b": torch.zeros(9), "steps": torch.tensor([1])}
    tuned = {
        "a": torch.randn(50, 30, generator=g),
        "b": torch.randn(9, generator=g),
        "steps": torch.tensor([2]),
    }
    optx.compress(optx.Delta.between(base, tuned), optx.ComPEFT(density=0.1)).save(folder / "x.compeft")


def _read_compeft(folder: Path) -> None:
    small = optx.Compressed.load(folder / "x.compeft")
    if small.numel < 1_000_000:
        small.decode()
        repr(small)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4)]), "head": nn.Linear(4, 2)}
    )


def _adapter(injection: optx.Injection) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        handle = optx.attach(_net(), injection, r"layers\.\d+")
        handle.save(folder)

    return make


_NET = _net()


def _attach(folder: Path) -> None:
    with optx.attach(_NET, folder):
        pass


def _attach_and_delta(folder: Path) -> None:
    refused = None
    try:
        _attach(folder)
    except optx.OptxError as error:
        refused = error
    dict(optx.Delta.lora(folder).items())
    if refused is not None:
        raise refused


def _signature(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    made = optx.Signature({"a": torch.randn(9, 7, generator=g), "b": torch.randn(5, generator=g)})
    signature = optx.Signature({**made.quantize(16).tensors, "c": torch.ones(3)})
    signature.save(folder / "s.safetensors")


def _plain(seed: int) -> dict[str, torch.Tensor]:
    return {n: t for n, t in _weights(seed).items() if t.dtype == torch.float32}


def _yaml(folder: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        save_file(_plain(seed), folder / name / "model.safetensors")
    text = """# a merge
models:
  - model: {0}/a
    parameters:
      weight: 0.5
      density: 0.9
  - model: {0}/b
    parameters: {{weight: 1e-1, density: 0.3}}
parameters: &p
  normalize: true
  int8_mask: true
base_model: {0}/base
merge_method: ties
dtype: bfloat16
tokenizer_source: base
"""
    (folder / "merge.yaml").write_text(text.format(folder))


FORMATS: dict[str, Format] = {
    "safetensors": Format(
        lambda folder: save_file(_weights(0), folder / "m.safetensors"),
        {"m.safetensors": mutations.safetensors},
        lambda folder: _read_all(Files(folder / "m.safetensors")),
    ),
    "index": Format(
        _make_index,
        {"model.safetensors.index.json": mutations.table, "config.json": mutations.table},
        _read_index,
    ),
    "delta": Format(
        _deltas,
        {"delta.safetensors": mutations.safetensors},
        lambda folder: dict(optx.Delta.load(folder / "delta.safetensors").items()),
    ),
    "compeft": Format(_compeft, {"x.compeft": mutations.compeft}, _read_compeft),
    "optx adapter": Format(
        _adapter(optx.SequentialAdapter(rank=3)), {"optx_adapter.safetensors": mutations.safetensors}, _attach
    ),
    "optx SVFit": Format(
        _adapter(optx.SVFit(rank=2)), {"optx_adapter.safetensors": mutations.safetensors}, _attach
    ),
    "PEFT config": Format(
        _adapter(optx.LoRA(rank=2, rank_pattern={"layers.1": 3})),
        {"adapter_config.json": mutations.table},
        _attach_and_delta,
    ),
    "PEFT tensors": Format(
        _adapter(optx.LoRA(rank=2)), {"adapter_model.safetensors": mutations.safetensors}, _attach_and_delta
    ),
    "signature": Format(
        _signature,
        {"s.safetensors": mutations.safetensors},
        lambda folder: dict(optx.Signature.load(folder / "s.safetensors")),
    ),
    "mergekit": Format(_yaml, {"merge.yaml": mutations.yaml}, lambda f: read_config(f / "merge.yaml")),
}


def other_files(folder: Path) -> list[bytes]:
    """A good file of every format, to be put in place of another."""
    found: list[bytes] = []
    for number, form in enumerate(FORMATS.values()):
        place = folder / f"other{number}"
        place.mkdir()
        form.make(place)
        found += [(place / name).read_bytes() for name in form.mutate]
    return found


def mutated(form: Format, good: dict[str, bytes], folder: Path, random: Random, others: list[bytes]) -> None:
    """Write a wrong file among the good ones."""
    wrong = random.choice(list(form.mutate))
    for name in form.mutate:
        data = form.mutate[name](good[name], random, others) if name == wrong else good[name]
        (folder / name).write_bytes(data)


Found: Any = tuple[str, str, float]
