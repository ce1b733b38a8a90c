"""safetensors files read tensor by tensor, in the memory of one tensor or of a piece of one.

The safetensors package maps whole files, so that what has been touched stays in a process's memory. The
format itself is small: the header's length (8 bytes), the header (JSON: name -> dtype, shape, offsets), the
tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO

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
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
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
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several numbers in a byte
_ONE = "model.safetensors"
_LARGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST_INDEX = 100_000_000
_LARGEST_CONFIG = 10_000_000


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
            check_plain(self.path)
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                header, self._start = _header(file, stat.st_size)
            self._mark, self._changed = _mark(stat), stat.st_ctime_ns
            self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", None))
            "".join(header).encode()  # half a letter, as JSON can write it, is a ValueError
            self._offsets = {name: _offsets(name, what) for name, what in header.items()}
            found = {name: entry_of(name, what) for name, what in header.items()}
        except FileNotFoundError:
            raise FileError(f"There is no file {str(self.path)!r}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise FileError(
                f"{str(self.path)!r} is damaged, or is no safetensors file ({_reason(error)})."
            ) from None
        self.entries = dict(sorted(found.items(), key=lambda item: self._offsets[item[0]]))
        self._check_places(stat.st_size)

    @property
    def state(self) -> tuple[object, ...]:
        """Plain values that change when the file does: its name, its place on the disk, its size and times.

        The time of its last change of any kind is the system's own and can't be set.
        """
        return (self.path.name, *self._mark, self._changed)

    def _check_places(self, size: int) -> None:
        """Raise unless the tensors' bytes lie one after the other, up to the end of the file."""
        end = 0
        for name, entry in self.entries.items():
            begin, stop = self._offsets[name]
            if stop - begin != entry.nbytes or self._start + stop > size:
                raise FileError(
                    f"{str(self.path)!r} is cut short or damaged: {name!r} should be {entry.nbytes} bytes at "
                    f"{self._start + begin}, and the file has {size}."
                )
            if begin != end:
                raise FileError(
                    f"{str(self.path)!r} is damaged: {name!r} begins at byte {begin} of the tensors, and "
                    f"what is before it ends at {end}."
                )
            end = stop
        if self._start + end != size:
            raise FileError(
                f"{str(self.path)!r} is damaged: its tensors end at {self._start + end}, and the file has "
                f"{size} bytes."
            )

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
            if _mark(os.fstat(file.fileno())) != self._mark:
                raise FileError(f"{str(self.path)!r} was changed or replaced while it was read.")
            file.seek(self._start + self._offsets[name][0] + begin * flat.dtype.itemsize)
            while fill.nbytes:
                count = file.readinto(fill)
                if not count:
                    raise FileError(f"{str(self.path)!r} became shorter while it was read.")
                fill = fill[count:]
        return flat


def check_plain(path: Path) -> None:
    """Raise if a path is a pipe or a device: opening it could wait for ever.

    Raises:
        ValueError: it is.
        FileNotFoundError: it isn't there.
    """
    mode = path.stat().st_mode
    if not (S_ISREG(mode) or S_ISDIR(mode)):
        raise ValueError("it is a pipe or a device")


def _mark(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header should have {length} bytes, the file has {size}")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, in which no name stands twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(name for name in table if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"it has {brief(twice)} twice")
    return table


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("its __metadata__ is no table of strings")
    return found


def _numbers(found: Any) -> tuple[int, ...]:
    """A list of sizes or places, of a stranger: bounded, so that products of them are too."""
    if not isinstance(found, list) or len(found) > 64:
        raise ValueError("a shape or a place is no list of numbers")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in found):
        raise ValueError("a shape or a place has a number that is none of its kind")
    return tuple(found)


def _offsets(name: str, what: dict[str, Any]) -> tuple[int, int]:
    begin, end = _numbers(what["data_offsets"])
    return begin, end


def entry_of(name: str, what: Mapping[str, Any]) -> Entry:
    """A tensor's shape and dtype, as a stranger's header has them.

    Raises:
        ValueError: they are none.
    """
    kind = what["dtype"]
    if kind in _PACKED:
        raise ValueError(
            f"{brief(name)} is {kind}, several numbers in a byte, as quantised models have it: dequantise "
            "the model first"
        )
    if kind not in DTYPES:
        raise ValueError(f"{brief(name)} is of a dtype {brief(kind)}, which this version does not know")
    return Entry(_numbers(what["shape"]), DTYPES[kind])


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its header is nested too deep"
    if isinstance(error, KeyError):
        return f"its header lacks {error}"
    if isinstance(error, OSError):
        return str(error.strerror)
    return brief(str(error), quote=False)


def brief(text: object, quote: bool = True, most: int = 200) -> str:
    """What a stranger wrote, in a message."""
    shown = repr(text) if quote else str(text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def shards(path: Path) -> Iterator[Path]:
    """The safetensors files of a folder that hold its model.

    In transformers' order: what ``config.json`` calls ``transformers_weights``, else ``model.safetensors``,
    else its index; an index that is left beside the one file of the same name is stale, and not read. Where
    there is none of these, another index, else all files.

    Raises:
        FileError: the folder has none, or the index names a file that is missing.
    """
    first = _first(path)
    if first is not None:
        yield from indexed(first) if first.name.endswith(".index.json") else (first,)
        return
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if not files:
        raise FileError(f"The folder {str(path)!r} has no *.safetensors file.")
    yield from files


def check_complete(folder: Path, names: Collection[str]) -> None:
    """Raise if the index by which a folder is read names a tensor that its shards haven't got.

    Such an index is of another model, or a shard is: what is missing would be left out without a word.
    """
    first = _first(folder)
    if first is None or not first.name.endswith(".index.json"):
        return
    for name, file in weight_map(first).items():
        if name not in names:
            raise FileError(f"{str(first)!r} says that {brief(name)} is in {file.name!r}, which has it not.")


def _first(path: Path) -> Path | None:
    """The file or index that a folder's model is read from; None: all files."""
    named = _named_in_config(path)
    first = next(
        (path / name for name in (*named, _ONE, f"{_ONE}.index.json") if (path / name).exists()), None
    )
    if first is None:
        indices = sorted(path.glob("*.safetensors.index.json"))
        first = next(iter(indices), None)
        if first is not None and (one := first.with_name(first.name.removesuffix(".index.json"))).exists():
            first = one
    return first


def _named_in_config(folder: Path) -> list[str]:
    """The file that a configuration names by itself; one that is missing is an error, as in transformers."""
    try:
        config = read_json(folder / "config.json", _LARGEST_CONFIG)
    except FileError:  # it is not what this reads
        return []
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        return []
    file = inside(folder, name, f"{str(folder / 'config.json')!r}")
    if not there(file):
        raise FileError(f"{str(folder / 'config.json')!r} names {brief(name)}, which is not in the folder.")
    return [name]


def inside(folder: Path, name: object, who: str) -> Path:
    """A file by a name that another file gives.

    Links are followed, as the Hub's cache is made of them; a name that leads out of the folder is not.

    Raises:
        FileError: the name is none, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4000:
        raise FileError(f"{who} names {brief(name)}, which is no file's name.")
    place = os.path.normpath(name)
    if os.path.isabs(name) or place == ".." or place.startswith(f"..{os.sep}"):
        raise FileError(f"{who} names {brief(name)}, which is outside its folder.")
    return folder / place


def there(path: Path) -> bool:
    """Whether there is such a file; a name that none can have is none's."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


_DEEPEST = 64
"""How deep a file's JSON may be nested: far more than any needs, and far less than Python's own limit."""


def parsed(text: str) -> Any:
    """What JSON of a stranger says.

    Raises:
        ValueError: it is no JSON, or nested so deep that whoever walks through it might not come back.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [found]
    for _ in range(_DEEPEST):
        inner = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        level = [value for values in inner for value in values]
        if not level:
            return found
    raise ValueError("it is nested too deep")


def read_json(path: Path, most: int) -> Any:
    """What a JSON file of a stranger holds.

    Raises:
        FileError: it is missing, longer than ``most`` bytes, or no JSON.
    """
    try:
        check_plain(path)
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than {most} bytes")
        return parsed(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileError(f"There is no file {str(path)!r}.") from None
    except (ValueError, OSError) as error:
        raise FileError(f"{str(path)!r} is damaged ({_reason(error)}).") from None


def weight_map(index: Path) -> dict[str, Path]:
    """Where an index says that each tensor is.

    Raises:
        FileError: the index is missing or damaged, or names a file that is missing or outside its folder.
    """
    table = read_json(index, _LARGEST_INDEX)
    found: Any = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(found, dict):
        raise FileError(f"{str(index)!r} is damaged (it has no table 'weight_map').")
    files: dict[object, Path] = {}
    for name in found.values():
        if not isinstance(name, str):
            raise FileError(f"{str(index)!r} is damaged (it names {brief(name)} for a file).")
        if name not in files:
            files[name] = inside(index.parent, name, f"{str(index)!r}")
            if not there(files[name]):
                raise FileError(f"{str(index)!r} names {brief(name)}, which is not in the folder.")
    return {tensor: files[name] for tensor, name in found.items()}


def indexed(index: Path) -> Iterator[Path]:
    """The shards that an index names, in its folder or below.

    Raises:
        FileError: as `weight_map`.
    """
    yield from sorted(set(weight_map(index).values()))
