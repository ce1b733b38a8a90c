"""One writer to an output: a lock beside it, which the system takes back when a process is killed.

The lock is the kernel's, on a hidden file. Where a file system has none, the file itself is the lock, and the
process that it names tells whether it is stale.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from optx._errors import FileError, OptxError

_MARK = b"optx is writing: process "
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_mine = threading.local()


@contextmanager
def claimed(out: Path) -> Generator[None]:
    """Hold an output for the time of a block; a thread that holds it may claim it again.

    Raises:
        OptxError: another process or thread writes to it.
        FileError: the lock can't be made.
    """
    place = out.parent.resolve() / out.name
    held: set[Path] = _mine.__dict__.setdefault("held", set())
    if place in held:
        yield
        return
    lock = place.with_name(f".{out.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(lock, out)
    except OSError as error:
        raise FileError(f"{str(out)!r} can't be written: {error.strerror} ({str(lock)!r}).") from error
    held.add(place)
    try:
        yield
    finally:
        held.discard(place)
        with suppress(OSError):
            os.unlink(lock)  # while it is still held: whoever waits for the name makes a file of his own
        os.close(file)


def _taken(lock: Path, out: Path) -> int:
    """The lock's file, held."""
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o644)
            new = True
        except FileExistsError:
            try:
                file, new = os.open(lock, os.O_RDWR | _NO_FOLLOW), False
            except FileNotFoundError:
                continue  # its holder has just ended
            except OSError as error:
                raise _foreign(lock, out) from error
        try:
            if not _is_ours(file):
                raise _foreign(lock, out)
            if _held(file, lock, out, new):
                os.ftruncate(file, 0)
                os.pwrite(file, _MARK + f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _held(file: int, lock: Path, out: Path, new: bool) -> bool:
    """Whether the lock is this call's now; False: it went away, try again."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return _held_by_name(file, lock, out, new)
    except OSError as error:
        if error.errno in _BUSY:
            raise _busy(file, out) from None
        if error.errno in _NO_LOCKS:
            return _held_by_name(file, lock, out, new)
        raise
    try:  # the holder before may have unlinked the file that was opened here
        return os.path.samestat(os.fstat(file), os.lstat(lock))
    except FileNotFoundError:
        return False


def _held_by_name(file: int, lock: Path, out: Path, new: bool) -> bool:
    """Without locks: whoever made the file holds it, as long as he lives."""
    if new:
        return True
    pid, host = _holder(file)
    if host == socket.gethostname() and pid is not None and not _alive(pid):
        os.unlink(lock)
        return False
    if host not in (None, socket.gethostname()):
        raise OptxError(
            f"out: {str(out)!r} is being written by process {pid} on {host!r}. If that has ended, delete "
            f"{str(lock)!r}."
        )
    raise _busy(file, out)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has such a number
        return False
    except OSError:  # another user's
        return True
    return True


def _is_ours(file: int) -> bool:
    """By its content; one that is empty was made by a process that had not come to write."""
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        return False
    return not about.st_size or os.pread(file, len(_MARK), 0) == _MARK


def _holder(file: int) -> tuple[int | None, str | None]:
    words = os.pread(file, 400, 0).removeprefix(_MARK).decode(errors="replace").split()
    return (int(words[0]), words[2]) if len(words) == 3 and words[0].isdigit() else (None, None)


def _busy(file: int, out: Path) -> OptxError:
    pid, _ = _holder(file)
    who = "another thread" if pid == os.getpid() else f"another process{f' ({pid})' if pid else ''}"
    return OptxError(f"out: {str(out)!r} is being written by {who}. Wait for it, or give another name.")


def _foreign(lock: Path, out: Path) -> FileError:
    return FileError(
        f"{str(out)!r} can't be written: {str(lock)!r}, by which writers keep out of each other's way, is a "
        "file that optx did not make. Move it away, or give another name."
    )
