"""Writes to a file behind the caller's back: one thread writes, another makes sure of what was written.

Whoever streams gigabytes through the page cache pays for it: the system copies every byte, finds memory for
it, and still has to wait for the disk at the end. So whole blocks go straight from here to the disk, where
the file system lets them (Linux's O_DIRECT), and only the odd ends of what was brought go the usual way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from queue import SimpleQueue
from typing import Any

import numpy as np

_BLOCK = 4096
"""What addresses, places in the file and lengths of direct writes are multiples of."""


@dataclass
class _Stage:
    """Bytes of the file from ``begin`` to ``end``, gathered in a buffer that starts at a block."""

    buffer: np.ndarray[Any, np.dtype[np.uint8]]
    begin: int
    end: int

    @property
    def start(self) -> int:
        """The place in the file of the buffer's first byte."""
        return _down(self.begin)

    @property
    def room(self) -> int:
        """Bytes that it can still take."""
        return self.start + len(self.buffer) - self.end

    def bytes(self, begin: int, end: int) -> memoryview:
        """Those of a part of the file."""
        return self.buffer[begin - self.start : end - self.start].data


class BackgroundFile:
    """A file written by a thread of its own, in the order asked for; little waits in memory.

    An error of either thread is raised at a later call, and nothing after it is called safe.

    Args:
        file: unbuffered, open for writing; closed by `close`.
    """

    STAGE, STAGES = 1 << 22, 3
    """Bytes that are written at once, and how many times that may wait: whoever brings more waits himself."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._direct = file, _direct(file)
        self._writing = ThreadPoolExecutor(1, "optx-write")
        self._syncing = ThreadPoolExecutor(1, "optx-sync")
        self._free: SimpleQueue[np.ndarray[Any, np.dtype[np.uint8]]] = SimpleQueue()
        for _ in range(self.STAGES):
            self._free.put(_aligned(self.STAGE))
        self._stage: _Stage | None = None
        self._failed = False
        self._jobs: list[Future[None]] = []

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write soon; ``data`` is copied."""
        rest = np.frombuffer(data, np.uint8)
        while len(rest):
            if self._stage is None or self._stage.end != offset or not self._stage.room:
                self._push()
                self._stage = _Stage(self._free.get(), offset, offset)
            stage, count = self._stage, min(len(rest), self._stage.room)
            at = offset - stage.start
            stage.buffer[at : at + count] = rest[:count]
            rest, offset = rest[count:], offset + count
            stage.end = offset
        self._check()

    def sync(self, then: Callable[[], None]) -> None:
        """Call ``then`` once all that was written before is safe on the disk."""

        def written() -> None:
            self._jobs.append(self._syncing.submit(safe))

        def safe() -> None:
            # Where a write failed, or an fsync (the next one may well succeed), the file has a hole.
            if self._failed:
                return
            try:
                os.fsync(self._file.fileno())
            except BaseException:
                self._failed = True
                raise
            then()

        self._push()
        self._jobs.append(self._writing.submit(written))

    def wait(self) -> None:
        """Until nothing is under way."""
        self._push()
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Let what is under way end, and close the file."""
        self._writing.shutdown()
        self._syncing.shutdown()
        self._file.close()
        if self._direct is not None:
            self._direct.close()

    def _push(self) -> None:
        """Have what was gathered written."""
        stage, self._stage = self._stage, None
        if stage is not None:
            self._jobs.append(self._writing.submit(self._write, stage))

    def _write(self, stage: _Stage) -> None:
        first = min(-_down(-stage.begin), stage.end)
        last = max(first, _down(stage.end))
        try:
            _put(self._file, stage.bytes(stage.begin, first), stage.begin)
            self._write_blocks(stage.bytes(first, last), first)
            _put(self._file, stage.bytes(last, stage.end), last)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._free.put(stage.buffer)

    def _write_blocks(self, data: memoryview, offset: int) -> None:
        if self._direct is not None:
            try:
                return _put(self._direct, data, offset)
            except OSError as error:
                # A file system with larger blocks, or a disk that took a part of one: the usual way tells.
                if error.errno != errno.EINVAL:
                    raise
                self._direct.close()
                self._direct = None
        _put(self._file, data, offset)

    def _check(self) -> None:
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()


def _down(offset: int) -> int:
    return offset // _BLOCK * _BLOCK


def _aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    raw = np.empty(size + _BLOCK, np.uint8)
    return raw[-raw.ctypes.data % _BLOCK :][:size]


def _direct(file: FileIO) -> FileIO | None:
    """The same file, past the page cache; None where the system or the file system has no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    flag |= getattr(os, "O_NOFOLLOW", 0)
    try:
        direct = FileIO(file.name, "r+", opener=lambda path, flags: os.open(path, flags | flag))
    except OSError:
        return None
    if os.path.samestat(os.fstat(file.fileno()), os.fstat(direct.fileno())):
        return direct
    direct.close()  # the name is another file's now
    return None


def _put(file: FileIO, data: memoryview, offset: int) -> None:
    if data.nbytes:
        file.seek(offset)
    while data.nbytes:
        data = data[file.write(data) :]
