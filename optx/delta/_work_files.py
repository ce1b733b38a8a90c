"""The hidden files beside an output that is being made: known by a mark, and never anybody else's.

Beside ``out`` there are ``.out.part``, a file or a folder, and ``.out.journal``, whose first line says whose
it is and of which computation. A part without such a journal is not optx's: it stays as it is, and the work
is done under another name. Links are never followed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from optx._errors import FileError, OptxError
from optx.delta._claim import claimed

_MARK = "optx"
_NAMES = 20
_LINE = 1 << 16
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Work(NamedTuple):
    """Where an output is made."""

    part: Path
    journal: Path


def work_of(out: Path) -> Work:
    """The first names for the work that are free, or optx's own.

    Raises:
        FileError: others have them all.
    """
    for number in range(_NAMES):
        middle = f".{number}" if number else ""
        work = Work(*(out.with_name(f".{out.name}{middle}.{end}") for end in ("part", "journal")))
        if _is_ours(work):
            return work
    raise FileError(
        f"{str(out)!r} can't be written: {str(out.with_name(f'.{out.name}.part'))!r} and {_NAMES - 1} more "
        "hidden names are taken by files that optx did not make. Move them away, or give another name."
    )


def _is_ours(work: Work) -> bool:
    """Whether both names are free, or a journal of optx's says that they are its own."""
    part, journal = (_stat(path) for path in work)
    if journal is None:
        return part is None
    known = stat.S_ISREG(journal.st_mode) and journal.st_nlink == 1
    plain = part is None or stat.S_ISDIR(part.st_mode) or (stat.S_ISREG(part.st_mode) and part.st_nlink == 1)
    # An empty one was made by a call that was killed before it wrote a word.
    return known and plain and (journal.st_size == 0 or _first(work.journal) is not None)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _first(journal: Path) -> dict[str, Any] | None:
    """What a journal's first line says, if it is optx's."""
    try:
        with opened(journal, "r") as file:
            line = file.read(_LINE) or b""
        found: Any = json.loads(line.partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get(_MARK) == "unfinished" else None


def opened(path: Path, mode: str) -> FileIO:
    """A file that is there, without following a link."""
    return FileIO(path, mode, opener=without_links)


def without_links(name: str, flags: int) -> int:
    """What opens a file, unless it is a link."""
    return os.open(name, flags | _NO_FOLLOW)


def notes(work: Work, about: dict[str, Any]) -> list[str] | None:
    """The journal's later lines, if it is of this very computation and its part is there; else None."""
    if _first(work.journal) != {_MARK: "unfinished", **about} or _stat(work.part) is None:
        return None
    with opened(work.journal, "r") as file:
        data = file.readall() or b""
    return data.decode(errors="replace").splitlines()[1:]


def start_anew(work: Work, about: dict[str, Any]) -> None:
    """Write the journal's first line; what it noted of another computation is forgotten at once."""
    line = json.dumps({_MARK: "unfinished", **about}) + "\n"
    there = _stat(work.journal) is not None
    with opened(work.journal, "r+") if there else FileIO(work.journal, "x") as file:
        file.truncate(0)
        file.write(line.encode())


def discard(out: Path) -> None:
    """Delete what an unfinished computation left beside its output; nothing else."""
    work = work_of(out)
    part = _stat(work.part)
    if part is not None:
        shutil.rmtree(work.part) if stat.S_ISDIR(part.st_mode) else os.unlink(work.part)
    work.journal.unlink(missing_ok=True)


def check_new(out: Path, who: str = "out") -> None:
    """Raise if an output exists, and clear away what a kill just after it was renamed has left beside it.

    Raises:
        OptxError: it exists, or is no name that a file can have.
    """
    if not out.name or "\0" in str(out):  # "" and "." are the folder one is in
        raise OptxError(f"{who}: {str(out)!r} is no name of a new file or folder.")
    if not os.path.lexists(out):
        return
    hidden = [out.with_name(f".{out.name}.{end}") for end in ("lock", "journal")]
    with suppress(OptxError, OSError):
        if any(map(os.path.lexists, hidden)):
            with claimed(out):
                work = work_of(out)
                if not os.path.lexists(work.part):
                    work.journal.unlink(missing_ok=True)
    raise OptxError(f"{who}: {str(out)!r} exists already. Give another name, or delete it.")
