"""safetensors files written tensor by tensor, in the memory of a few pieces, and gone on with after a kill.

The safetensors package writes only what it is given at once.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optx._buffers import PIECE, release
from optx._safetensors import NAMES, Entry
from optx.delta._background_file import BackgroundFile


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
