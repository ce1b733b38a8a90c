"""A run's checkpoint without the base model: adapters, and what else of it has trained or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError
from optx._files import written_aside
from optx._names import placed_like
from optx.inject._folder import CONFIG, OWN
from optx.inject._folder import REST as REST
from optx.inject._handle import Handle
from optx.inject._stored import check_tensors
from optx.integrations import _adapter_folders
from optx.integrations._base_left_out import (
    BaseLeftOut,
    adapters_own,
    as_text,
    from_text,
    is_left_out,
    saved_tensors,
)

_MODEL, _HANDLE = "model.", "handle."


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
        left_out = self._base.names()
        _adapter_folders.save(self.handles, folder, True)
        own = adapters_own(self.handles)
        rest = {
            f"{_MODEL}{name}": t
            for name, t in saved_tensors(self.module)
            if id(t) not in own and not is_left_out(name, left_out)
        }
        for number, handle in enumerate(self.handles):
            for key, t in _adapter_folders.beside_the_parts(handle).items():
                rest[f"{_HANDLE}{number}.{key}"] = t
        _write(folder / REST, rest, as_text(left_out))

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds adapters (of `save`, or of a handle alone)."""
        places = _adapter_folders.folders(self.handles, folder)
        return (folder / REST).exists() or any((p / name).exists() for p in places for name in (OWN, CONFIG))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit; a base model that is another one is warned of.

        Raises:
            FileError: a file is damaged, or of another model, rank or choice of targets.
        """
        nothing: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}
        rest, left_out = _read(folder / REST) if (folder / REST).exists() else nothing
        self._base.tell_of_another(left_out)
        here = dict(saved_tensors(self.module))
        found = {key.removeprefix(_MODEL): t for key, t in rest.items() if key.startswith(_MODEL)}
        there = {name: here[name] for name in found if name in here}
        check_tensors(found, there, f"{self._where}: {str(folder / REST)!r}")
        _adapter_folders.load(self.handles, folder)
        for number, handle in enumerate(self.handles):
            start = f"{_HANDLE}{number}."
            beside = {key.removeprefix(start): t for key, t in rest.items() if key.startswith(start)}
            _adapter_folders.load_beside(handle, beside)
        with torch.no_grad():
            for name, t in found.items():
                here[name].copy_(placed_like(t, here[name]))


def _write(file: Path, tensors: Mapping[str, Tensor], left_out: str) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    # Copies: safetensors takes no two names of one storage.
    copies = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    with written_aside(file) as aside:
        save_file(copies, aside, metadata={"optx_left_out": left_out})


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as given:
            opened: Any = given
            left_out = from_text((opened.metadata() or {})["optx_left_out"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, left_out  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FileError(f"{str(file)!r} is damaged ({error}).") from error
