"""Writes mup_tables.json: what the package mup gives each parameter. Needs ``pip install mup``.

    python tests/scaling/record_mup.py

The package pulls in torchvision, so it is not among the test requirements; its numbers are.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mup
import torch
from mup_models import BASE, DECAY, LR, MODELS, TARGETS

FILE = Path(__file__).with_name("mup_tables.json")
OPTIMIZERS = {"sgd": mup.MuSGD, "adam": mup.MuAdam, "adamw": mup.MuAdamW}


def scaled(name: str, width: int) -> tuple[torch.nn.Module, dict[str, float]]:
    """A model with its base shapes, and by what each parameter was multiplied."""
    make = MODELS[name]
    base, delta = make(BASE, mup.MuReadout), make(2 * BASE, mup.MuReadout)
    torch.manual_seed(0)
    model = make(width, mup.MuReadout)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    mup.set_base_shapes(model, base, delta=delta)
    return model, {n: float(p.detach().flatten()[0]) for n, p in model.named_parameters()}


def numbers(model: torch.nn.Module, optimizer: str) -> dict[str, Any]:
    """Learning rate and weight decay of each parameter."""
    opt = OPTIMIZERS[optimizer](model.parameters(), lr=LR, weight_decay=DECAY)
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in opt.param_groups for p in g["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters()}


def tables() -> Iterator[dict[str, Any]]:
    """One for each model and width."""
    for name in MODELS:
        for width in TARGETS:
            model, init = scaled(name, width)
            found = {one: numbers(model, one) for one in OPTIMIZERS}
            yield {"model": name, "width": width, "init": init, **found}


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(table) for table in tables())
    FILE.write_text(f'{{"mup": "{importlib.metadata.version("mup")}", "tables": [\n{lines}\n]}}\n')
