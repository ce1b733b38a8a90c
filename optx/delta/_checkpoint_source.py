"""Where tensors come from: a module, a state dict, a safetensors file, or a folder of shards."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from optx._buffers import PIECE
from optx._errors import FileError, OptxError, ShapeError
from optx._safetensors import Entry, Reader, check_complete, read_json, shards
from optx.delta._mixed_sum import AllOf
from optx.delta._refusals import check_numbers, plain_tensor

COMPRESSED = b"optx-cpf"
"""What the file of a compressed delta begins with."""
_OPEN_DELTA = "Open it with optx.Delta.load, and apply or merge what that gives."
Checkpoint: TypeAlias = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""A module, a state dict, a safetensors file, or a folder with one or several of them."""


class Source(ABC):
    """Tensors by name, read when asked for; none is ever written to.

    Attributes:
        entries: shape and dtype by name, in an order that is cheap to read in.
        tied: names whose tensor is the one of another name, by name.
    """

    entries: dict[str, Entry]
    tied: dict[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor; not to be written to."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is, for messages."""

    @abstractmethod
    def head(self, name: str, count: int) -> Tensor:
        """The first numbers of one tensor, flat."""

    @abstractmethod
    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """The numbers ``begin`` to ``end`` of one tensor, flat; not to be written to."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """All numbers of one tensor, flat, `PIECE` at a time; see `piece`."""
        numel = self.entries[name].numel
        return (self.piece(name, at, min(at + PIECE, numel)) for at in range(0, numel, PIECE))

    @property
    @abstractmethod
    def state(self) -> tuple[object, ...]:
        """Values that are told apart by their text, for plans: another whenever the tensors are others."""

    def fingerprint(self, name: str) -> str:
        """A hash of a tensor's shape and first numbers: tells checkpoints apart without reading them."""
        some = self.head(name, 256).to(torch.float64).cpu().contiguous()
        text = f"{self.entries[name].shape}".encode() + some.numpy().tobytes()
        return hashlib.blake2b(text, digest_size=8).hexdigest()


class Memory(Source):
    """A module's or a dict's tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self._label = label
        self._tensors: dict[str, Tensor] = {}
        self._flat = ("", torch.empty(0))  # the last one asked for by pieces: it may have had to be copied
        self.tied = {}
        first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"{label}: {name!r} is a {type(tensor).__name__}, not a tensor.")
            tensor = plain_tensor(label, name, tensor)
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and key in first:
                self.tied[name] = first[key]
                continue
            first[key] = name
            self._tensors[name] = tensor.detach()
        self.entries = {n: Entry(tuple(t.shape), t.dtype) for n, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def head(self, name: str, count: int) -> Tensor:
        """Its first numbers."""
        return self._tensors[name].flatten()[:count]

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """A view, if the tensor is contiguous."""
        known, flat = self._flat
        if known != name:
            flat = self._tensors[name].reshape(-1)
            self._flat = (name, flat)
        return flat[begin:end]

    @property
    def state(self) -> tuple[object, ...]:
        """A hash of every number, made when it is asked for its text."""
        return (AllOf(self._tensors),)

    def places(self) -> dict[str, tuple[object, ...]]:
        """Where each tensor lies in memory, and how."""
        return {
            n: (t.data_ptr(), t.device, t.dtype, tuple(t.shape), t.stride()) for n, t in self._tensors.items()
        }

    @property
    def label(self) -> str:
        """What it is."""
        return self._label


class Files(Source):
    """One safetensors file, or the shards of a folder.

    Attributes:
        path: of the file or the folder.
        files: that it reads.
        readers: of each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = list(shards(path)) if path.is_dir() else [path]
        self._where: dict[str, Reader] = {}
        self.tied = {}  # a file holds a tied tensor once, or as two that are equal
        self.readers = [Reader(file) for file in self.files]
        for reader in self.readers:
            for name in reader.entries:
                if name in self._where:
                    raise FileError(f"{name!r} is in two files of {str(path)!r}.")
                self._where[name] = reader
        self.entries = {name: reader.entries[name] for name, reader in self._where.items()}
        if path.is_dir():
            check_complete(path, self.entries)

    def read(self, name: str) -> Tensor:
        """Read from the disk, into memory of its own."""
        return self._where[name].read(name)

    def head(self, name: str, count: int) -> Tensor:
        """Its first numbers."""
        return self._where[name].head(name, count)

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """Read from the disk, into memory of its own."""
        return self._where[name].piece(name, begin, end)

    @property
    def state(self) -> tuple[object, ...]:
        """Of each file its name, its place on the disk, size and times; see `Reader.state`."""
        return tuple(reader.state for reader in self.readers)

    def file_of(self, name: str) -> Path:
        """The shard that a tensor is in."""
        return self._where[name].path

    def place_of(self, file: Path) -> str:
        """A shard's name in the folder, with the folder below that it may be in."""
        return file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name

    def config(self) -> dict[str, Any]:
        """What the folder's ``config.json`` says, if it has one that can be read."""
        try:
            found = read_json(self.path / "config.json", 10_000_000)
        except FileError:
            return {}
        return cast(dict[str, Any], found) if isinstance(found, dict) else {}

    @property
    def label(self) -> str:
        """Its path."""
        return str(self.path)


def check_alike(who: str, name: str, entry: Entry, where: str, old: Entry, advice: str) -> None:
    """Raise unless a tensor has the base's shape, and is floating where the base's is.

    Args:
        who: the function, for messages.
        name: of the tensor.
        entry: the tensor's.
        where: what has it.
        old: the base's.
        advice: what may be done ``with exclude=``.
    """
    if old.shape != entry.shape:
        way = f", or take it whole from tuned with whole={name!r}" if who == "Delta.between" else ""
        raise ShapeError(
            f"{who}: {name!r} has shape {entry.shape} in {where} and {old.shape} in base. {advice} with "
            f"exclude=, or resize one{_resizing(entry, old)}{way}."
        )
    if old.dtype.is_floating_point != entry.dtype.is_floating_point:
        raise OptxError(f"{who}: {name!r} is {entry.dtype} in {where} and {old.dtype} in base.")
    check_numbers(who, name, entry, where)
    check_numbers(who, name, old, "base")


def _resizing(entry: Entry, old: Entry) -> str:
    """How, where it is a matter of new tokens."""
    rows = (len(entry.shape), entry.shape[1:]) == (len(old.shape), old.shape[1:])
    return " (new tokens: model.resize_token_embeddings)" if rows and len(old.shape) == 2 else ""


def _of_weights(path: Path, what: str) -> Files:
    """A model's files. A delta's has its model's names and shapes: it would be taken for weights."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(COMPRESSED)) == COMPRESSED:
                raise FileError(f"{what}: {str(path)!r} is a compressed delta. {_OPEN_DELTA}")
    files = Files(path)
    for reader in files.readers:
        if "optx" in reader.metadata:
            raise FileError(
                f"{what}: {str(reader.path)!r} is a delta, an adapter or an optimizer that optx saved, not a "
                f"model's weights; or these are weights in RF8: optx.rf8.load gives them. If it is a delta: "
                f"{_OPEN_DELTA[0].lower()}{_OPEN_DELTA[1:]}"
            )
    return files


def open_source(checkpoint: Checkpoint | Source, what: str) -> Source:
    """A source of whatever holds tensors.

    Args:
        checkpoint: see `Checkpoint`.
        what: the argument's name, for messages.

    Raises:
        OptxError: it is none of these.
        FileError: the file or folder is missing or damaged.
    """
    if isinstance(checkpoint, Source):
        return checkpoint
    if isinstance(checkpoint, nn.Module):
        return Memory(checkpoint.state_dict(), f"{what} ({type(checkpoint).__name__})")
    if isinstance(checkpoint, Mapping):
        return Memory(checkpoint, what)
    if isinstance(checkpoint, str | PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        path = Path(checkpoint).expanduser()
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise FileError(
                f"{what}: {str(path)!r} is a pickle, which can run code when it is opened. Convert it to "
                "safetensors, or load it yourself with torch.load(weights_only=True) and pass the dict."
            )
        if not path.exists():
            raise FileError(f"{what}: there is no file or folder {str(path)!r}.")
        return _of_weights(path, what)
    raise OptxError(
        f"{what} is a {type(checkpoint).__name__}; it must be a module, a state dict, a safetensors file, or "
        "a folder of them."
    )
