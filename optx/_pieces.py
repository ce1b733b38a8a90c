"""Engines that leave a process with pieces of parameters in a row, in the place of the parameters themselves.

A DTensor knows the whole that it is a part of, and sums over it are completed. These know nothing of the
kind: what a method takes over a tensor (a projection, a distance, a mask, an average) would be taken over
other numbers, or over none, without an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Pieces(NamedTuple):
    """An engine's name, what it makes of a parameter, and what to do."""

    engine: str
    what: str
    way_out: str


FSDP1 = Pieces(
    "FSDP1",
    "a piece of a flat parameter of FSDP1 (FullyShardedDataParallel), which has no shape of its own",
    "Shard the model with torch.distributed.fsdp.fully_shard (FSDP2; in Accelerate fsdp_version=2)",
)
ZERO3 = Pieces(
    "ZeRO-3",
    "partitioned by DeepSpeed's ZeRO-3, and a process has a piece of it at most",
    "Shard the model with torch.distributed.fsdp.fully_shard (FSDP2)",
)


def pieces_of(p: Tensor) -> Pieces | None:
    """Which engine has cut a parameter up; None: none has, or one whose parts know the whole (DTensor)."""
    # By what they mark parameters with: neither needs to be imported, nor to be there.
    marked: Any = p
    if getattr(marked, "_fsdp_flattened", False):
        return FSDP1
    return ZERO3 if hasattr(marked, "ds_id") else None
