"""A run's checkpoint without the base model: adapters, and what else of it has trained or changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from optx.inject import _rest
from optx.inject._base_marks import saved_tensors, tell_of_another
from optx.inject._folder import CONFIG, OWN
from optx.inject._handle import Handle
from optx.inject._rest import REST as REST
from optx.integrations import _adapter_folders
from optx.integrations._base_left_out import BaseLeftOut


class AdapterCheckpoint:
    """Saves and loads what a script that makes the same base model can't make anew.

    Args:
        module: the model that is trained.
        handles: what is attached in it.
        where: what an error begins with.

    Raises:
        OptxError: no handle, or one that was removed or is of another model.
    """

    def __init__(self, module: nn.Module, handles: Sequence[Handle], where: str) -> None:
        self.module, self.handles, self._where = module, list(handles), where
        self._base = BaseLeftOut(module, handles, where)

    def save(self, folder: Path) -> None:
        """Write the adapters' folders, and the rest in a file beside them.

        Raises:
            MergeError: an adapter is merged.
        """
        _adapter_folders.save_trained(self._base, folder, True)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds adapters (of `save`, or of a handle alone)."""
        places = _adapter_folders.folders(self.handles, folder)
        return (folder / REST).exists() or any((p / name).exists() for p in places for name in (OWN, CONFIG))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit; a base model that is another one is warned of.

        Raises:
            FileError: a file is damaged, or of another model, rank or choice of targets.
        """
        rest = _rest.read(folder / REST) if (folder / REST).exists() else _rest.Rest()
        here = dict(saved_tensors(self.module))
        tell_of_another(here, rest.left_out, "resuming")
        rest.check(here, f"{self._where}: {str(folder / REST)!r}")
        _adapter_folders.check_adapters(rest, self.handles, folder, self._where)
        _adapter_folders.load(self.handles, folder)
        _adapter_folders.load_beside(self.handles, rest.handles)
        rest.put(self.module)
