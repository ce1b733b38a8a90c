"""Writes to a file behind the caller's back: one thread writes, another makes sure of what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from threading import Condition


class Behind:
    """A file written by a thread of its own, in the order asked for; few pieces wait in memory.

    An error of either thread is raised at the next call, and nothing after it is called safe.

    Args:
        file: unbuffered, open for writing; closed by `close`.
    """

    WAITING = 8_000_000
    """Bytes that may wait: they bridge uneven speeds. Whoever brings more waits himself."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._writing = ThreadPoolExecutor(1, "optx-write")
        self._syncing = ThreadPoolExecutor(1, "optx-sync")
        self._changed, self._bytes = Condition(), 0
        self._failed = False
        self._jobs: list[Future[None]] = []

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write soon; ``data`` must not be changed after."""
        with self._changed:
            self._bytes += len(data)
        self._jobs.append(self._writing.submit(self._write, data, offset))
        del data  # freed as soon as it is written
        with self._changed:
            self._changed.wait_for(lambda: self._bytes <= self.WAITING)
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

        self._jobs.append(self._writing.submit(written))

    def wait(self) -> None:
        """Until nothing is under way."""
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Let what is under way end, and close the file."""
        self._writing.shutdown()
        self._syncing.shutdown()
        self._file.close()

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        try:
            self._file.seek(offset)
            rest = memoryview(data)
            while rest.nbytes:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._changed:
                self._bytes -= len(data)
                self._changed.notify()

    def _check(self) -> None:
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()
