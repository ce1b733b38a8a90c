"""Files are written beside their target and renamed: a kill leaves the old file whole."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from optx._errors import OptxError, shown


def as_path(owner: str, argument: str, given: Any) -> Path:
    """A path with the user's folder in the place of ``~``.

    Args:
        owner: whose argument it is.
        argument: its name.
        given: what was given.

    Raises:
        OptxError: it is no path.
    """
    if not isinstance(given, str | PathLike):
        raise OptxError(f"{owner}: {argument} is {shown(given)}; it must be a path.")
    return Path(given).expanduser()  # pyright: ignore[reportUnknownArgumentType]


def check_writable(owner: str, argument: str, path: Path) -> None:
    """Raise, before what takes long, if nothing can be written into a file's folder.

    Raises:
        OptxError: it can't; the system's reason is told.
    """
    try:  # permissions alone do not tell: a disk may be read-only, and a superuser passes by them
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.").cleanup()
    except OSError as error:
        raise OptxError(
            f"{owner}: {argument} is {str(path)!r}, which can't be written to its folder ({error.strerror})."
        ) from None


@contextmanager
def written_aside(path: str | PathLike[str]) -> Generator[Path]:
    """A temporary file in the target's folder, which takes the target's name at the end.

    If the block raises, the temporary file is deleted and the target is what it was.

    Raises:
        OSError: nothing can be written into that folder, which it names: it isn't there (FileNotFoundError),
            is a file (NotADirectoryError), read-only or full; or the target is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "Give the name of a file to save to; this is a folder", str(target)
        )
    try:
        made = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:  # it names a file that nobody asked for
        why = f"{error.strerror}: can't write {target.name!r} into this folder"
        raise OSError(error.errno, why, str(target.parent)) from None
    with made as folder:
        aside = Path(folder, "part")
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors leaves its files to their owner alone
        os.replace(aside, target)
