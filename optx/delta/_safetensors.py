"""safetensors files read and written tensor by tensor, in the memory of one tensor.

The safetensors package maps whole files, so that what has been touched stays in a process's memory, and it
writes only what it is given at once. The format itself is small: the header's length (8 bytes), the header
(JSON: name -> dtype, shape, offsets), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optx._errors import FileError
from optx.delta._background_file import BackgroundFile
from optx.delta._buffers import empty, release

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
PIECE = 1 << 20
"""Numbers of a tensor that are worked on at once, where a computation is element by element."""
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

        Meant to be held for a short while: see `optx.delta._buffers`.
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


class _Making(NamedTuple):
    """A piece of a tensor that a thread makes."""

    name: str
    made: Future[Tensor]
    offset: int
    last: bool


class Writer:
    """A safetensors file written tensor by tensor, which can be killed and gone on with.

    The bytes go into a hidden file beside the target, and the names of tensors that are safely there into a
    journal; `finish` gives the file its name. Opening the same plan again goes on after the journal's last.

    Args:
        path: the target.
        entries: every tensor that will be written.
        metadata: strings for the header.
        plan: names the computation; a part that another plan left is begun again.
    """

    FLUSH = 64_000_000
    """Bytes after which what is written is made safe."""
    AHEAD = 3
    """Pieces that are being made, or wait, while one is brought to the file."""

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], plan: str
    ) -> None:
        self.path, self.entries = path, dict(entries)
        self._part = path.with_name(f".{path.name}.part")
        self._journal = path.with_name(f".{path.name}.journal")
        header, self._offsets = _layout(self.entries, metadata)
        self._waiting: list[str] = []
        self._bytes = 0
        self.written: set[str] = set()
        first = json.dumps({"plan": plan, "header": len(header)})
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        if lines[:1] == [first] and self._part.exists():
            self.written = {json.loads(line) for line in lines[1:] if _whole(line)} & set(self.entries)
            self._file = BackgroundFile(FileIO(self._part, "r+"))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The old journal goes first: it must never stand beside a new part.
            self._journal.unlink(missing_ok=True)
            self._file = BackgroundFile(FileIO(self._part, "w+"))
            self._journal.write_text(first + "\n")
        self._file.write(header, 0)  # each time: it was perhaps not yet on the disk when the journal began
        self._log = self._journal.open("a")
        self._makers = ThreadPoolExecutor(min(2, torch.get_num_threads()), "optx-make")
        self._making: deque[_Making] = deque()
        self._compiled = False

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor, in the planned shape and dtype."""
        entry = self.entries[name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
        self._gather(0)
        self._file.write(_raw(tensor), self._offsets[name])
        self._note(name)

    def write_pieces(self, name: str, piece: Callable[[int, int], Tensor]) -> None:
        """One tensor, made by a function of where a piece begins and ends; few pieces are in memory.

        Up to two of torch's threads call the function at once, the last pieces perhaps after this returns:
        an error in them is raised by a later call.
        """
        entry = self.entries[name]
        for begin in range(0, max(1, entry.numel), PIECE):
            end = min(begin + PIECE, entry.numel)
            made = self._makers.submit(piece, begin, end)
            if not self._compiled:
                made.result()  # it may have to import and compile, which is for one at a time
                self._compiled = True
            offset = self._offsets[name] + begin * entry.dtype.itemsize
            self._making.append(_Making(name, made, offset, end == entry.numel))
            del made  # freed as soon as it is in the file
            self._gather(self.AHEAD)

    def _gather(self, ahead: int) -> None:
        """Bring the pieces to the file in order, but for the last ``ahead`` that may still be being made."""
        while len(self._making) > ahead:
            making = self._making.popleft()
            made = making.made.result()
            dtype = self.entries[making.name].dtype
            assert made.dtype == dtype, (making.name, made.dtype)
            self._file.write(_raw(made), making.offset)
            if making.last:
                self._note(making.name)

    def _note(self, name: str) -> None:
        self._waiting.append(name)
        self._bytes += self.entries[name].nbytes
        if self._bytes >= self.FLUSH:
            self._bytes = 0
            self.flush()

    def flush(self) -> None:
        """Have what is written made safe and noted, while the next is made."""
        names, self._waiting = self._waiting, []

        def note() -> None:
            self._log.write("".join(json.dumps(name) + "\n" for name in names))
            self._log.flush()
            self.written.update(names)

        self._file.sync(note)

    def finish(self) -> None:
        """Give the file its name, once every tensor is in it."""
        self._gather(0)
        self.flush()
        self._file.wait()
        missing = set(self.entries) - self.written
        assert not missing, missing
        self.close()
        # In this order a kill leaves nothing beside a finished file; between the two it costs the work.
        self._journal.unlink(missing_ok=True)
        os.replace(self._part, self.path)

    def close(self) -> None:
        """Leave what is there for another time."""
        self._makers.shutdown(cancel_futures=True)
        self._making.clear()
        release()
        self._file.close()
        self._log.close()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _whole(line: str) -> bool:
    """Whether a line of the journal was written to its end."""
    return line.startswith('"') and line.endswith('"') and len(line) > 1


def _layout(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset, begins = 0, dict[str, int]()
    # The wider first, as the safetensors package does it, so that every tensor is aligned.
    for name, entry in sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begins[name] = offset
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


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
