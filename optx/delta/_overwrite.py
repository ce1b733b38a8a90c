"""An output that exists: the command line refuses, or puts the new one in its place at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optx._errors import OptxError

_OF_A_MODEL = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".py")


@contextmanager
def output(out: Path, overwrite: bool, inputs: Sequence[Path]) -> Generator[Path]:
    """Where to write what is to have the name ``out``.

    With ``overwrite``, that is a hidden name beside it, under which an interrupted command goes on; what was
    there stays whole until the new one is.

    Raises:
        OptxError: ``out`` exists and may not be replaced: not asked for, an input, or no model.
    """
    out = out.expanduser()
    place = Path(os.path.abspath(out))  # "." has a name, too
    new, old = (place.parent / f".{word}.{place.name}" for word in ("new", "old"))
    if old.exists() and not out.exists():
        os.replace(old, out)  # a command was killed between the two renames below
    if not out.exists():
        yield out
        return
    if not overwrite:
        raise OptxError(f"out: {str(out)!r} exists already. Give another name, or --overwrite to replace it.")
    _check_replaceable(out, inputs)
    _delete(new)  # one that was done and never took its place
    yield new
    if not out.is_dir():
        os.replace(new, out)
        return
    _delete(old)
    os.replace(out, old)  # a folder takes the place of nothing but an empty one
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    _delete(old)


def _check_replaceable(out: Path, inputs: Sequence[Path]) -> None:
    why = _why_not(out)
    for given in inputs:
        if out.resolve() in (given.expanduser().resolve(), *given.expanduser().resolve().parents):
            why = f"{str(given)!r} is read from it"
    if why:
        raise OptxError(f"out: {str(out)!r} is not overwritten: {why}. Give another name.")


def _why_not(out: Path) -> str:
    if out.is_symlink():
        return "it is a link"
    if out.suffix == ".safetensors":
        return "" if out.is_file() else "it is a folder, and a file is to be written"
    if not out.is_dir():
        return "it is a file, and a folder is to be written"
    inside = sorted(out.iterdir())
    foreign = [path.name for path in inside if not path.is_file() or path.suffix not in _OF_A_MODEL]
    if foreign:
        return f"it holds {foreign[0]!r}, which is no part of a model"
    if inside and not any(path.suffix == ".safetensors" for path in inside):
        return "it holds no *.safetensors file, so it is no model"
    return ""


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
