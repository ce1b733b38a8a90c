"""Folders of adapters beside a trainer's checkpoint files, written and deleted with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optx._errors import OptxError
from optx._names import is_dtensor
from optx.integrations._module_checkpoints import AdaptersOnly


class BesideCheckpoints:
    """Lightning's ``CheckpointIO``, which writes ``step=3.adapter`` beside ``step=3.ckpt``.

    Args:
        inner: what reads and writes the files themselves.
        keeper: what the folders hold.
    """

    def __init__(self, inner: Any, keeper: AdaptersOnly) -> None:
        self.inner, self.keeper = inner, keeper

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the folder, then the file."""
        if "://" in str(path):
            raise OptxError(
                f"OptxCallback: folders=True writes to folders of this machine, and this checkpoint goes to "
                f"{str(path)!r}. Leave folders out; optx.attach and handle.save make the folder later."
            )
        if any(is_dtensor(p) for handle in self.keeper.handles for p in handle.parameters()):
            raise OptxError(
                "OptxCallback: folders=True writes from one rank, and the adapters are sharded over several. "
                "Leave folders out, and call handle.save(folder) on every rank after the training."
            )
        self.keeper.save_folder(folder_beside(path), writes=True)
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file, and its folder."""
        self.inner.remove_checkpoint(path)
        shutil.rmtree(folder_beside(path), ignore_errors=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def folder_beside(path: Any) -> Path:
    """The folder of a checkpoint file."""
    file = Path(path)
    return file.with_name(f"{file.name.removesuffix('.ckpt')}.adapter")
