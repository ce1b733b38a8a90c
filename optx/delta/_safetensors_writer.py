"""safetensors files written tensor by tensor, in the memory of a few pieces, and gone on with after a kill.

The safetensors package writes only what it is given at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optx._buffers import PIECE, release
from optx._errors import FileError
from optx._safetensors import NAMES, Entry
from optx.delta._background_file import BackgroundFile
from optx.delta._work_files import notes, opened, start_anew, without_links, work_of


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
        path.parent.mkdir(parents=True, exist_ok=True)
        self._work = work_of(path)
        header, self._offsets = _layout(self.entries, metadata)
        self._waiting: list[str] = []
        self._bytes = 0
        about = {"plan": plan, "header": hashlib.blake2b(header, digest_size=16).hexdigest()}
        self.written = self._known(notes(self._work, about))
        if not self.written:
            # The journal first: what it said of other tensors must never stand beside these.
            start_anew(self._work, about)
        self._file = BackgroundFile(self._opened())
        self._file.write(header, 0)  # each time: it was perhaps not yet on the disk when the journal began
        self._log = opened(self._work.journal, "a")
        self._makers = ThreadPoolExecutor(min(2, torch.get_num_threads()), "optx-make")
        self._making: deque[_Making] = deque()
        self._compiled = False

    def _known(self, lines: list[str] | None) -> set[str]:
        """The tensors that a journal says are safe, if the part is long enough to have them."""
        names = {json.loads(line) for line in lines or () if _whole(line)} & set(self.entries)
        size = self._work.part.stat().st_size if names else 0
        ends = [self._offsets[name] + self.entries[name].nbytes for name in names]
        return names if size >= max(ends, default=0) else set()

    def _opened(self) -> FileIO:
        """The part, empty unless some of it is safe."""
        if not os.path.lexists(self._work.part):
            return FileIO(self._work.part, "x+")
        if self._work.part.is_dir():  # a folder was to have this name before
            shutil.rmtree(self._work.part)
            return FileIO(self._work.part, "x+")
        file = FileIO(self._work.part, "r+", opener=without_links)
        if not self.written:
            file.truncate(0)
        return file

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
            self._log.write("".join(json.dumps(name) + "\n" for name in names).encode())
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
        if os.path.lexists(self.path):
            raise FileError(f"{str(self.path)!r} could not be written: somebody else has made it meanwhile.")
        # In this order a kill between the two leaves a journal, by which the next call knows its own.
        os.replace(self._work.part, self.path)
        self._work.journal.unlink(missing_ok=True)

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
