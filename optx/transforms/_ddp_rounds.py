"""DistributedDataParallel beside rounds that freeze: it exchanges what was trainable when it was made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from optx._errors import TransformError


class KnownDDP:
    """The DDPs around a model that knew all of it, made before a round froze anything."""

    def __init__(self) -> None:
        self._whole: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the model is in no DDP

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._whole = weakref.WeakSet()

    def see(self, model: nn.Module) -> None:
        """Before the first round: these know all."""
        for ddp in _around(model):
            self._whole.add(ddp)

    def check(self, model: nn.Module) -> None:
        """Raise before a round thaws what a DDP leaves to each process."""
        if self._another(model):
            gc.collect()  # one that was dropped, but is not gone yet
        if self._another(model):
            raise TransformError(
                "HFT: a DistributedDataParallel was made while a round held a part of the model frozen: it "
                "would not exchange the gradients of what the next round thaws, and processes would drift "
                "apart. Make it before optx.wrap, with find_unused_parameters=True; or drop it, call "
                "opt.hft.next_round(), and make it anew for each round."
            )

    def _another(self, model: nn.Module) -> bool:
        return any(ddp not in self._whole for ddp in _around(model))


def _around(model: nn.Module) -> Iterator[Any]:
    """The DDPs that the model is in, itself too; only they know."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    kind = nn.parallel.DistributedDataParallel
    inner = model.module if isinstance(model, kind) else model
    for found in gc.get_objects():
        if type(found) is kind and any(part is inner for part in found.modules()):
            yield found
