"""Anchors on the disk: safetensors files, folders of shards, and torch files, memory-mapped."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optx._errors import FileError
from optx._safetensors import Reader, indexed, shards

Stamp = tuple[int, int, int, int]
"""What tells that a file was written to: device, inode, size, time."""
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_TORCH_NAME = "pytorch_model.bin"  # transformers' name, in a folder that has no safetensors


class AnchorFiles(Mapping[str, Any]):
    """The tensors of one or several files by name, each a view of its mapped file.

    Args:
        paths: a safetensors file, a torch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``; read with
            ``weights_only=True``), a folder of shards, an index file of shards, or a list of files.

    Attributes:
        loaded: whether every value is there already, as in torch files.
        stamps: of the files that stay mapped. One that is written to in place, under the mapping, would
            change the anchors, or end the process where it became shorter.

    Raises:
        FileError: a file is missing, damaged, or no checkpoint; or two have a tensor of one name.
    """

    def __init__(self, paths: str | PathLike[str] | Sequence[str | PathLike[str]]) -> None:
        self._readers: dict[str, Callable[[], Any]] = {}
        self.stamps: dict[str, Stamp] = {}
        listed = [paths] if isinstance(paths, str | PathLike) else paths
        files = [file for path in listed for file in _files_of(Path(path).expanduser())]
        self.loaded = all(file.suffix in _TORCH for file in files)
        for file in files:
            found = _torch_file(file) if file.suffix in _TORCH else _safetensors_file(file)
            if twice := next((name for name in found if name in self._readers), None):
                raise FileError(f"{twice!r} is in two of the files; the other is {str(file)!r}")
            self._readers.update(found)
            if file.suffix not in _TORCH or zipfile.is_zipfile(file):
                self.stamps[str(file)] = stamp_of(str(file))

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers


def stamp_of(path: str) -> Stamp:
    """A file's stamp as it is now."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def overwritten(path: str, stamp: Stamp) -> bool:
    """Whether the very file was written to; one that was replaced or deleted lives on in its mapping."""
    try:
        now = stamp_of(path)
    except OSError:
        return False
    return now[:2] == stamp[:2] and now != stamp


def _files_of(path: Path) -> list[Path]:
    """The files that a folder or an index stands for."""
    if path.name.endswith(".index.json"):
        return list(indexed(path))
    if not path.is_dir():
        return [path]
    if not any(path.glob("*.safetensors*")):
        if (index := path / f"{_TORCH_NAME}.index.json").exists():
            return list(indexed(index))
        if (file := path / _TORCH_NAME).exists():
            return [file]
    return list(shards(path))


def _safetensors_file(path: Path) -> dict[str, Callable[[], Any]]:
    from safetensors import SafetensorError, safe_open

    reader = Reader(path)
    if "optx" in reader.metadata:
        # A delta has its model's names and shapes: it would be taken for weights without a word.
        raise FileError(f"{str(path)!r} is a delta or an optimizer that optx saved, not a model's weights")
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileError(str(error)) from error
    return {name: partial(file.get_tensor, name) for name in reader.entries}


def _torch_file(path: Path) -> dict[str, Callable[[], Any]]:
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}")
    try:
        # Files older than torch 1.6 are no archives, and can't be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise FileError(
            f"{str(path)!r} is a pickle that holds more than tensors and plain data (weights_only=True "
            "refuses it), or none; load it yourself and pass the model's state dict"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise FileError(f"{str(path)!r} is damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(loaded, Mapping):
        raise FileError(f"{str(path)!r} holds a {type(loaded).__name__}, not a state dict")
    return {name: partial(_same, value) for name, value in loaded.items()}


def _same(value: Tensor) -> Tensor:
    return value
