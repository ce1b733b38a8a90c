"""safetensors files read tensor by tensor, in the memory of one tensor or of a piece of one.

The safetensors package maps whole files, so that what has been touched stays in a process's memory. The
format itself is small: the header's length (8 bytes), the header (JSON: name -> dtype, shape, offsets), the
tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optx._buffers import empty
from optx._errors import FileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * self.dtype.itemsize


class Reader:
    """One safetensors file; a tensor is read when it is asked for, into memory of its own.

    Attributes:
        entries: shape and dtype by name, in the order of the file's bytes.
        metadata: the header's own strings.

    Raises:
        FileError: no such file, or one that is damaged or cut short.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        try:
            header, self._start, size = _header(self.path)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._offsets = {name: tuple(what["data_offsets"]) for name, what in header.items()}
            found = {
                name: Entry(tuple(what["shape"]), DTYPES[what["dtype"]]) for name, what in header.items()
            }
        except FileNotFoundError:
            raise FileError(f"There is no file {str(self.path)!r}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise FileError(
                f"{str(self.path)!r} is damaged, or is no safetensors file ({type(error).__name__}: {error})."
            ) from None
        for name, entry in found.items():
            begin, end = self._offsets[name]
            if end - begin != entry.nbytes or begin < 0 or self._start + end > size:
                raise FileError(
                    f"{str(self.path)!r} is cut short or damaged: {name!r} should be {entry.nbytes} bytes at "
                    f"{self._start + begin}, and the file has {size}."
                )
        self.entries = dict(sorted(found.items(), key=lambda item: self._offsets[item[0]]))

    def read(self, name: str) -> Tensor:
        """A tensor, in memory that is the caller's."""
        entry = self.entries[name]
        return self.head(name, entry.numel).view(entry.shape)

    def head(self, name: str, count: int) -> Tensor:
        """The first numbers of a tensor, flat."""
        entry = self.entries[name]
        return self._fill(torch.empty(min(count, entry.numel), dtype=entry.dtype), name, 0)

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """The numbers ``begin`` to ``end`` of a tensor, flat, in memory that is the caller's.

        Meant to be held for a short while: see `optx._buffers`.
        """
        return self._fill(empty(end - begin, self.entries[name].dtype), name, begin)

    def _fill(self, flat: Tensor, name: str, begin: int) -> Tensor:
        fill = flat.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._offsets[name][0] + begin * flat.dtype.itemsize)
            while fill.nbytes:
                count = file.readinto(fill)
                if not count:
                    raise FileError(f"{str(self.path)!r} became shorter while it was read.")
                fill = fill[count:]
        return flat


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length, size


def shards(path: Path) -> Iterator[Path]:
    """The safetensors files of a folder, by its index if it has one.

    Raises:
        FileError: the folder has none, or the index names a file that is missing.
    """
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    if index is not None:
        yield from indexed(index)
        return
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileError(f"The folder {str(path)!r} has no *.safetensors file.")
    yield from files


def indexed(index: Path) -> Iterator[Path]:
    """The shards that an index names, beside it.

    Raises:
        FileError: the index is missing or damaged, or names a file that is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except FileNotFoundError:
        raise FileError(f"There is no file {str(index)!r}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{str(index)!r} is damaged ({error}).") from None
    for name in names:
        if not (index.parent / name).exists():
            raise FileError(f"{str(index)!r} names {name!r}, which is not in the folder.")
        yield index.parent / name
