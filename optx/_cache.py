"""Where optx keeps what it can make or fetch again: compiled kernels, models and texts."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


class NoCacheError(OSError):
    """There is no folder for caches; says why, in one sentence."""


class UnsafeCacheError(NoCacheError):
    """There is one, but others could have written what lies in it."""


# ---- which folder -----------------------------------------------------------------------------------


def cache_root() -> Path:
    """``OPTX_CACHE_DIR``, else the platform's folder for caches; absolute, not made here.

    Raises:
        NoCacheError: neither is known.
    """
    if chosen := os.environ.get("OPTX_CACHE_DIR"):
        return _absolute(_expanded(chosen, "OPTX_CACHE_DIR"))
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else _home() / "AppData" / "Local") / "optx" / "cache"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "optx"
    xdg = _expanded(os.environ.get("XDG_CACHE_HOME", ""), "XDG_CACHE_HOME")
    # A relative one is to be ignored, says the XDG specification.
    return (xdg if xdg.is_absolute() else _home() / ".cache") / "optx"


def _home() -> Path:
    """The user's home. An empty or relative HOME would put caches wherever the program happens to stand."""
    if os.name != "posix":
        with suppress(RuntimeError):
            return Path.home()
    elif os.path.isabs(home := os.environ.get("HOME", "")):
        return Path(home)
    else:
        import pwd

        with suppress(KeyError):
            home = Path(pwd.getpwuid(os.getuid()).pw_dir)
            if home.is_absolute():
                return home
    raise NoCacheError("the user has no home folder; set OPTX_CACHE_DIR to a folder")


def _expanded(path: str, variable: str) -> Path:
    parts = Path(path).parts
    if parts[:1] == ("~",):
        return _home().joinpath(*parts[1:])
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise NoCacheError(f"{variable} is {path!r}, and there is no such user; give a folder") from None


@functools.cache  # a relative folder is the same one all through a program, which may change its own
def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:
        raise NoCacheError(
            f"OPTX_CACHE_DIR is {str(path)!r}, relative to a folder that is gone; give an absolute one"
        ) from None


# ---- folders of this user alone -----------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Make a folder, and what is missing above it, for the user alone, whatever the umask."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    with suppress(FileExistsError):  # of another process that was faster; or a file, as opening it will say
        folder.mkdir(0o700)
        folder.chmod(0o700)


_NOFOLLOW, _NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_BINARY, _DIRECTORY = getattr(os, "O_BINARY", 0), getattr(os, "O_DIRECTORY", 0)


class PrivateFolder:
    """A folder of files that will be run, so only the user may have written them.

    As ssh has it for keys: the folder is the user's own and closed to others (what was open is closed), and
    so is each file. It is opened anew for each use and the checks are on what was opened, so that nobody can
    exchange it in between. Windows has other means; there nothing is checked.

    Args:
        path: made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises `UnsafeCacheError` if others could have written here; a folder that isn't there is fine."""
        with suppress(FileNotFoundError), self._opened():
            pass

    def probe(self) -> None:
        """Raises `OSError` if files can't be kept here."""
        name = f".probe.{secrets.token_hex(8)}"
        self.write(name, b"")
        self.read(name)
        (self.path / name).unlink()

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `OSError` if there is none, or none that is the user's own."""
        with self._opened() as folder:
            # A pipe must not be waited for, nor a link followed out of here.
            flags = os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _BINARY
            with open(os.open(self._at(folder, name), flags, dir_fd=folder), "rb") as file:
                _check_own(os.fstat(file.fileno()), self.path / name, stat.S_ISREG)
                return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all. Raises `OSError`."""
        make_folder(self.path)
        with self._opened() as folder:
            aside = self._at(folder, f".{name}.{secrets.token_hex(8)}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY
            handle = os.open(aside, flags, 0o600, dir_fd=folder)
            try:
                with open(handle, "wb") as file:
                    if folder is not None:
                        os.fchmod(handle, 0o600)
                    file.write(content)
                self._rename(folder, aside, name)
            except BaseException:
                with suppress(OSError):
                    os.unlink(aside, dir_fd=folder)
                raise

    @contextmanager
    def locked(self, name: str, longest: float) -> Generator[bool]:
        """Hold a lock that one process has at a time; after so many seconds of waiting, without it.

        Yields:
            Whether another process had it.

        Raises:
            OSError: nothing can be kept or locked here.
        """
        make_folder(self.path)
        with self._opened() as folder:
            flags = os.O_RDWR | os.O_CREAT | _NOFOLLOW | _NONBLOCK
            handle = os.open(self._at(folder, name), flags, 0o600, dir_fd=folder)
        try:
            yield _lock(handle, longest)
        finally:
            with suppress(OSError):  # who waits has this file open, and finds afterwards what was kept
                os.unlink(self.path / name)
            _unlock(handle)
            os.close(handle)

    def _rename(self, folder: int | None, aside: str, name: str) -> None:
        target = self._at(folder, name)
        try:
            os.replace(aside, target, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:  # not by us
            shutil.rmtree(self.path / name)
            os.replace(aside, target, src_dir_fd=folder, dst_dir_fd=folder)

    def _at(self, folder: int | None, name: str) -> str:
        return name if folder is not None else str(self.path / name)

    @contextmanager
    def _opened(self) -> Generator[int | None]:
        """The folder's descriptor, checked; None where there are none."""
        if os.name != "posix":
            yield None
            return
        if self.path.is_symlink():  # of the user: then it leads where the user wants
            _check_own(self.path.lstat(), self.path, stat.S_ISLNK)
        folder = os.open(self.path, os.O_RDONLY | _DIRECTORY)
        try:
            mode = os.fstat(folder).st_mode
            if mode & 0o077 and os.fstat(folder).st_uid == os.geteuid():
                os.fchmod(folder, mode & 0o700)
            _check_own(os.fstat(folder), self.path, stat.S_ISDIR)
            yield folder
        finally:
            os.close(folder)


def _lock(handle: int, longest: float) -> bool:
    """Whether it had to be waited for."""
    try:
        import fcntl
    except ImportError:
        raise OSError("no file locks on this platform") from None
    end, waited = time.monotonic() + longest, False
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            waited = True
            time.sleep(0.02)
    return waited


def _unlock(handle: int) -> None:
    """Closing would not do: a process that was forked meanwhile has it open too."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def _check_own(found: os.stat_result, path: Path, kind: object) -> None:
    """Raise unless it is of the kind, the user's, and not writable by others."""
    if not callable(kind) or not kind(found.st_mode):
        raise NoCacheError(f"{path} is neither a plain file nor a folder")
    if os.name != "posix":
        return
    if found.st_uid != os.geteuid():
        raise UnsafeCacheError(f"{path} belongs to user {found.st_uid}, not to user {os.geteuid()} who runs")
    if found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode):  # a link's mode says nothing
        raise UnsafeCacheError(f"{path} can be written by others, and can't be closed to them")


def kernel_folder() -> PrivateFolder:
    """Where compiled kernels are kept. Raises `NoCacheError`."""
    return PrivateFolder(cache_root() / "kernels")
