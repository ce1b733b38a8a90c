"""What a command reads: every file, and every link that leads to one, by its place on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from optx._errors import OptxError
from optx._safetensors import shards

_LINKS = 40  # as many as Linux follows


class Inputs:
    """The files and folders that were named on the command line, or in a file of it.

    Raises:
        FileError: a model's folder is damaged.
    """

    def __init__(self, given: Sequence[Path]) -> None:
        self._given = [(str(path), expanded(path, "input")) for path in given]

    def entries(self) -> Iterator[tuple[str, Path]]:
        """What was given, with each entry of a folder on the way to a file that is read for it."""
        for given, path in self._given:
            for file in (path, *_files(path)):
                for entry in _way(file):
                    yield given, entry

    def folders(self) -> Iterator[tuple[str, Path]]:
        """What was given, with where it is, of those that are folders."""
        for given, path in self._given:
            if path.is_dir():
                yield given, path.resolve()


def expanded(path: Path, what: str) -> Path:
    """A path without ``~``.

    Raises:
        OptxError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise OptxError(f"{what}: {str(path)!r} begins with nobody's name who has a home here.") from None


def entry_of(path: Path) -> Path:
    """Where a path's own name stands: links are followed up to there, and it may be one."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def at_or_in(entry: Path, place: Path) -> bool:
    """Whether one entry is another, or lies in it at any depth; neither has links on its way."""
    return any(_same(above, place) for above in (entry, *entry.parents))


def _same(one: Path, other: Path) -> bool:
    """By the disk, not by the letters: it may not tell capitals from small ones."""
    if one == other:
        return True
    if not (one.exists() and other.exists() and one.samefile(other)):
        return False
    # A hard link elsewhere is another entry: it stays when this one is replaced.
    links = one.is_symlink() or other.is_symlink()
    return not links and (one.is_dir() or one.parent.samefile(other.parent))


def _files(path: Path) -> Iterator[Path]:
    """What is read of a model's folder: what lies in it, and what its index names."""
    if path.is_dir():
        yield from (file for file in path.iterdir() if not file.is_dir())
        yield from shards(path)


def _way(path: Path) -> Iterator[Path]:
    """The links on the way to a file, and where it is: each without links before its last name."""
    path = path.absolute()
    here, rest, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    while rest:
        name = rest.pop()
        if name == "..":
            here = here.parent
            continue
        here /= name
        if here.is_symlink() and links < _LINKS:
            yield here
            target, links = Path(os.readlink(here)), links + 1
            here = Path(target.anchor) if target.is_absolute() else here.parent
            rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
    yield here
