"""Checkpoints of adapters where Accelerate shards a model (FSDP2), and writes it before it asks any hook."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from optx.inject._handle import Handle
from optx.integrations._module_checkpoints import AdaptersOnly


class ShardedAdapters:
    """Has a sharded model's state dict be the adapters' while its Accelerator saves or loads.

    The Accelerator's two methods are replaced on the object, as nothing else is asked in time.
    """

    def __init__(self, accelerator: Any, model: nn.Module, handles: Sequence[Handle], place: int) -> None:
        self._accelerator, self.place = accelerator, place
        self._keeper = AdaptersOnly(model, handles)
        self._keeper.acting = False
        for name in ("save_state", "load_state"):
            setattr(accelerator, name, self._acting_in(getattr(accelerator, name)))
        self._hook = accelerator.register_save_state_pre_hook(self._save_folders)

    def remove(self) -> None:
        """Have the Accelerator save and load whole models again."""
        self._hook.remove()
        self._keeper.remove()
        for name in ("save_state", "load_state"):
            self._accelerator.__dict__.pop(name, None)

    def _acting_in(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            self._keeper.acting = True
            try:
                return method(*args, **options)
            finally:
                self._keeper.acting = False

        return call

    def _save_folders(self, models: Any, weights: Any, output_dir: str) -> None:
        """What `optx.attach` and PEFT read, beside what Accelerate reads; every rank gathers it."""
        self._keeper.save_folder(place_in(output_dir, self.place), self._accelerator.is_main_process)


def place_in(folder: str, place: int) -> Path:
    """Where a model's adapters are: a first one's in the checkpoint itself, others' by Accelerate's names."""
    return Path(folder) / f"model_{place}" if place else Path(folder)
