"""The random state of a run, for trainers whose checkpoints don't hold it: one of each process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def take() -> dict[str, Any]:
    """The states of torch, its current device, NumPy and Python, as tensors and plain numbers."""
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put(state: dict[str, Any]) -> None:
    """Go on from a state that `take` gave."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    version, numbers, more = state["python"]
    random.setstate((version, tuple(numbers), more))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def of_all_ranks() -> list[dict[str, Any]]:
    """`take` of every process, in the order of their ranks; each of them has to call."""
    own = take()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)  # type: ignore[no-untyped-call]
    return every
