"""Saves two adapters to one folder by turns, until it is killed: `test_adapter_save.py` does that."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import nn

import optx


def main(folder: Path, other: bool) -> None:
    """Say when the first is there; with ``other``, every second save has another method's files."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    one = optx.attach(model, optx.LoRA(rank=2), "0")
    two = optx.attach(model, optx.SVFit(rank=2) if other else optx.LoRA(rank=48, alpha=3), "0", name="two")
    for handle in itertools.cycle([one, two]):
        handle.save(folder)
        print("saved", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "other")
