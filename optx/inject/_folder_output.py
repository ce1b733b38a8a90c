"""A folder of a few files that appears, or changes, as a whole.

The files are written in a hidden folder, synced to the disk, and put in place by one renaming. Where that
can't be (other files are in the folder, or the system can't exchange two folders), each is renamed by itself,
after all of them are on the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM, errno.EACCES)


@contextmanager
def written_folder(target: Path, own: Collection[str], is_own: Callable[[Path], bool]) -> Generator[Path]:
    """A hidden folder whose files take their places in ``target`` at the end.

    If the block raises, or nothing can be written, the target is what it was; a kill leaves it so too, with a
    hidden folder beside it, or in it.

    Args:
        target: which may be there already.
        own: names of files that may be replaced, and are deleted if they are not written again.
        is_own: whether a file of such a name is one; what is not stays, and is not replaced.

    Raises:
        OSError: nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    alone = not target.exists() or _may_go_whole(target, own, is_own)
    aside = _made_in(target.parent if alone else target, target.name)
    try:
        yield aside
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        if not (alone and _put_whole(aside, target, own, is_own)):
            _put_each(aside, target, own, is_own)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _made_in(parent: Path, name: str) -> Path:
    aside = parent / f".{name}.{secrets.token_hex(4)}"
    try:
        aside.mkdir()  # not tempfile's, which is for one user alone
    except OSError as error:
        why = f"{error.strerror}: can't write into this folder"
        raise OSError(error.errno, why, str(parent)) from None
    return aside


def _may_go_whole(target: Path, own: Collection[str], is_own: Callable[[Path], bool]) -> bool:
    """Whether another folder may stand for this one: there is nothing else in it, or that holds on to it."""
    if target.is_symlink() or target.is_mount() or target.samefile(Path.cwd()):
        return False
    return os.access(target.parent, os.W_OK) and all(
        file.name in own and is_own(file) and file.is_file() and not file.is_symlink()
        for file in target.iterdir()
    )


def _put_whole(aside: Path, target: Path, own: Collection[str], is_own: Callable[[Path], bool]) -> bool:
    """Give the new folder its name, by one renaming; False if that can't be done here."""
    if target.exists():
        aside.chmod(target.stat().st_mode & 0o7777)
    try:
        aside.rename(target)
    except OSError as error:  # there is a folder with files
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    else:
        return True
    if not _may_go_whole(target, own, is_own):  # somebody has put something in it meanwhile
        return False
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(aside), _HERE, os.fsencode(target), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _put_each(aside: Path, target: Path, own: Collection[str], is_own: Callable[[Path], bool]) -> None:
    """Rename file by file; what is no longer written goes last."""
    target.mkdir(exist_ok=True)
    names = {file.name for file in aside.iterdir()}
    for name in (name for name in own if name in names):  # in the order given
        if not (target / name).exists() or is_own(target / name):
            os.replace(aside / name, target / name)
    for name in own:
        if name not in names and (target / name).exists() and is_own(target / name):
            (target / name).unlink()
    _sync(target)


def _sync(path: Path) -> None:
    """Have the disk hold a file or a folder, where the system can be asked for that."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return  # folders can't be opened on Windows
    try:
        os.fsync(number)
    finally:
        os.close(number)
