"""An output that exists: the command line refuses, or puts the new one in its place at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optx._errors import OptxError
from optx.delta._claim import claimed
from optx.delta._inputs import Inputs, at_or_in, entry_of, expanded
from optx.delta._known_files import unknown_file


@contextmanager
def output(out: Path, overwrite: bool, inputs: Sequence[Path]) -> Generator[Path]:
    """Where to write what is to have the name ``out``.

    With ``overwrite``, that is a hidden name beside it, under which an interrupted command goes on; what was
    there stays whole until the new one is.

    Raises:
        OptxError: ``out`` can't be written to, or it exists and may not be replaced: not asked for, read by
            the command, or more than a model. Nothing has changed then.
    """
    out = expanded(out, "out")
    read = Inputs(inputs)
    _check_place(out)
    place = entry_of(out)  # "." has a name, too
    new, old, gone = (place.with_name(f".{word}.{place.name}") for word in ("new", "old", "gone"))
    parts = [path.with_name(f".{path.name}.{end}") for path in (place, new) for end in ("part", "journal")]
    _check_read(out, read, (place, new, old, gone, *parts))
    if old.exists() and not out.exists():
        os.replace(old, out)  # a command was killed between the two renames below
    if not out.exists():
        yield out
        return
    if not overwrite:
        raise OptxError(f"out: {str(out)!r} exists already. Give another name, or --overwrite to replace it.")
    if why := _why_not(out, read):
        raise _refused(out, why)
    with claimed(new):  # a second command neither deletes what this one writes, nor renames in between
        _delete(new)  # one that was done and never took its place
        yield new
        if why := _why_not(out, read):  # somebody has put a file there since
            raise OptxError(f"out: {str(out)!r} is not overwritten: {why}. The new one is {str(new)!r}.")
        _put_in_place(new, out, old, gone)


def _put_in_place(new: Path, out: Path, old: Path, gone: Path) -> None:
    if not out.is_dir():
        os.replace(new, out)
        return
    _discard(old, gone)
    os.replace(out, old)  # a folder takes the place of nothing but an empty one
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    _discard(old, gone)


def _check_place(out: Path) -> None:
    """That something can have this name; the system's own error would come when all the work is done."""
    if out.is_symlink() and not out.exists():
        raise OptxError(f"out: {str(out)!r} is a link to {os.readlink(out)!r}, which is not there.")
    above = next((path for path in out.absolute().parents if os.path.lexists(path)), None)
    if above is not None and not above.is_dir():
        what = "a link that leads nowhere" if above.is_symlink() else "a file"
        raise OptxError(f"out: {str(out)!r} can't be written: {str(above)!r} is {what}, and no folder.")


def _check_read(out: Path, read: Inputs, places: Sequence[Path]) -> None:
    """That nothing goes away with these places, or is added to a model, that the command reads."""
    there = entry_of(out)
    for given, entry in read.entries():
        if any(at_or_in(entry, place) for place in places):
            raise _refused(out, f"{given!r} is read from it")
    for given, folder in read.folders():
        if out.exists() and at_or_in(there, folder):
            raise _refused(out, f"it is a part of {given!r}, which is read")
        if out.suffix == ".safetensors" and there.parent.exists() and there.parent.samefile(folder):
            raise OptxError(f"out: {str(out)!r} would be a part of the model {given!r}. Give another folder.")


def _refused(out: Path, why: str) -> OptxError:
    return OptxError(f"out: {str(out)!r} is not overwritten: {why}. Give another name.")


def _why_not(out: Path, read: Inputs) -> str:
    if out.is_symlink():
        return "it is a link"
    if out.suffix == ".safetensors":
        return "" if out.is_file() else "it is a folder, and a file is to be written"
    if not out.is_dir():
        return "it is a file, and a folder is to be written"
    foreign = unknown_file(out, [folder for _, folder in read.folders()])
    if foreign is not None:
        return f"it holds {foreign!r}, which neither optx nor transformers wrote"
    if any(out.iterdir()) and not any(path.suffix == ".safetensors" for path in out.iterdir()):
        return "it holds no *.safetensors file, so it is no model"
    return ""


def _discard(old: Path, gone: Path) -> None:
    """Delete what may be put back until now: under a name from which nothing is, as it may stop half-way."""
    _delete(gone)
    if old.exists():
        os.replace(old, gone)
        _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
