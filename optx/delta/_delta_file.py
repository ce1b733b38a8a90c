"""A delta's own file: safetensors, with tensors that are mostly zeros as gaps and values, or as columns.

The header's string ``optx`` is JSON: ``kind`` (``"delta"``), ``version``, ``plan``, ``fingerprints`` and
``tensors``: by name, shape, dtype and ``form``.

- ``dense``: the tensor as it is, under its name.
- ``sparse``: ``NAME::values``, the nonzeros in order, and ``NAME::gaps``, how many zeros lie before each: 8,
  16 or 32 bits, whichever takes least. The largest code adds its own number of zeros and no value.
- ``columns``: ``NAME::columns``, int32, which of dimension 1 are not all zeros, and ``NAME::values``, those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from optx._errors import FileError, OptxError
from optx._safetensors import NAMES, Entry, Reader, brief, entry_of, parsed
from optx.delta._checkpoint_output import plan_of
from optx.delta._claim import claimed
from optx.delta._compressed_file import is_compressed, read
from optx.delta._difference import Difference
from optx.delta._safetensors_writer import Writer
from optx.delta._work_files import check_new, work_of

Opened: TypeAlias = tuple[dict[str, Entry], Callable[[str], Tensor], dict[str, Any]]
"""Shapes and dtypes by name, a reader by name, and ``{"plan": ..., "fingerprints": {name: str}}``."""

_VERSION = 1
_MOST_ZEROS = 1 << 40  # numbers of a tensor that a few bytes stand for
_GAPS = (torch.uint8, torch.uint16, torch.uint32)


@dataclass(frozen=True)
class _Form:
    """How one tensor is stored."""

    form: str
    parts: Mapping[str, Entry]


def save_delta(delta: Difference, path: Path) -> Path:
    """Write a delta in the memory of a few tensors; killed, the same call goes on where it was.

    The header comes first and says how much is kept, so the delta is computed twice: once to count.

    Raises:
        OptxError: the file exists, or the disk is too small.
        FileError: the disk failed, or became full.
    """
    if path.suffix != ".safetensors":
        raise OptxError(f"Delta.save: {str(path)!r} must end in .safetensors.")
    check_new(path, "Delta.save")
    if clash := next((name for name in delta.entries if "::" in name), None):
        raise OptxError(f"Delta.save: {clash!r} has '::' in its name, which the file's own entries use.")
    with claimed(path):
        return _save(delta, path)


def _save(delta: Difference, path: Path) -> Path:
    for base in delta.bases:
        base.watch()  # the first pass reads all of the bases: their hashes cost no reading of their own
    forms = {name: _form(name, tensor) for name, tensor in delta.items()}
    plan = plan_of("save", delta.recipe)
    about = {
        "kind": "delta",
        "version": _VERSION,
        "plan": plan,
        "fingerprints": delta.fingerprints,
        "contents": {name: found for name in delta.floating if (found := delta.content(name))},
        "whole": sorted(delta.whole),
        "tensors": {
            name: {"form": forms[name].form, "shape": list(entry.shape), "dtype": NAMES[entry.dtype]}
            for name, entry in delta.entries.items()
        },
    }
    parts = {part: entry for form in forms.values() for part, entry in form.parts.items()}
    _check_room(path, sum(entry.nbytes for entry in parts.values()))
    try:
        writer = Writer(path, parts, {"optx": json.dumps(about)}, plan)
        try:
            for name, form in forms.items():
                if not writer.written.issuperset(form.parts):
                    for part, tensor in _encode(name, delta[name], form).items():
                        writer.write(part, tensor)
            writer.finish()
        finally:
            writer.close()
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be written: {error.strerror}.") from error
    return path


def open_delta(path: Path) -> Opened:
    """Read a delta's file: nothing but its header, and tensors when they are asked for.

    Raises:
        FileError: the file is missing, damaged, of a later version, or not a delta's.
    """
    if path.is_file() and is_compressed(path):
        delta = read(path).difference(Difference)
        told = {"fingerprints": delta.fingerprints, "contents": delta.contents, "whole": []}
        return delta.entries, delta.__getitem__, {"plan": delta.recipe, "state": (), **told}
    reader = Reader(path)
    about: Any = None
    try:
        about = parsed(reader.metadata["optx"])
        known = about["kind"] == "delta"
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise FileError(
            f"{str(path)!r} is no delta that optx saved. Checkpoints go to optx.Delta.between(base, tuned)."
        )
    return _open_plain(reader, about)


def _open_plain(reader: Reader, about: Mapping[str, Any]) -> Opened:
    where = f"{str(reader.path)!r}"
    if about.get("version") != _VERSION:
        raise FileError(
            f"{where} has version {brief(about.get('version'))}; this reads {_VERSION}. Update optx."
        )
    try:
        entries = {name: entry_of(name, what) for name, what in about["tensors"].items()}
        forms = {name: str(what["form"]) for name, what in about["tensors"].items()}
        told = {
            "plan": str(about["plan"]),
            "state": reader.state,
            "fingerprints": _strings(about["fingerprints"]),
            "contents": _strings(about.get("contents", {})),
            "whole": [str(name) for name in about.get("whole", ())],
        }
        for name, form in forms.items():
            _check_parts(reader, name, entries[name], form)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, FileError):
            raise
        lacks = f"lacks {brief(error.args[0])}" if isinstance(error, KeyError) else brief(error, quote=False)
        raise FileError(f"{where} is damaged: its header {lacks}.") from None
    return entries, lambda name: _decode(reader, name, entries[name], forms[name]), told


def _strings(table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise ValueError("has a table of strings that is none")
    return table


def _check_parts(reader: Reader, name: str, entry: Entry, form: str) -> None:
    """Raise unless the stored tensors fit the one that they make: before its memory is asked for."""
    parts = [reader.entries[part] for part in _parts(name, form)]
    values, where = parts[0], parts[-1]
    fits = values.dtype == entry.dtype
    if form == "dense":
        fits = fits and values.shape == entry.shape
    elif form == "sparse":
        fits = fits and len(values.shape) == len(where.shape) == 1 and where.dtype in _GAPS
        # A code stands for so many zeros and one number at most.
        fits = fits and entry.numel <= _MOST_ZEROS and values.numel <= where.numel
    else:
        rest = (*values.shape[:1], *values.shape[2:]) == (*entry.shape[:1], *entry.shape[2:])
        fits = fits and len(entry.shape) > 1 and len(values.shape) == len(entry.shape) and rest
        fits = fits and where.dtype == torch.int32 and where.shape == values.shape[1:2]
        fits = fits and where.numel <= min(entry.shape[1:2]) and entry.numel <= _MOST_ZEROS
    if not fits:
        raise FileError(
            f"{str(reader.path)!r} is damaged: what it has of {name!r} does not make that tensor."
        )


def _parts(name: str, form: str) -> tuple[str, ...]:
    return {
        "dense": (name,),
        "sparse": (f"{name}::values", f"{name}::gaps"),
        "columns": (f"{name}::values", f"{name}::columns"),
    }[form]


def _form(name: str, tensor: Tensor) -> _Form:
    """The form that takes the fewest bytes."""
    choices = [_Form("dense", {name: Entry(tuple(tensor.shape), tensor.dtype)})]
    size = tensor.element_size()
    # A kept number takes its own bytes and at least one: with more of them the dense form is the smaller.
    if (
        tensor.is_floating_point()
        and (tensor.numel() - tensor.count_nonzero()) * (size + 1) - tensor.numel() > 0
    ):
        zeros = _gaps(tensor)
        for dtype in _GAPS:
            full = torch.iinfo(dtype).max
            codes = len(zeros) + int((zeros // full).sum())
            values = Entry((len(zeros),), tensor.dtype)
            choices.append(
                _Form("sparse", {f"{name}::values": values, f"{name}::gaps": Entry((codes,), dtype)})
            )
        if tensor.ndim > 1:
            shape = tuple(tensor.shape)
            count = len(_columns(tensor))
            values = Entry((shape[0], count, *shape[2:]), tensor.dtype)
            index = Entry((count,), torch.int32)
            choices.append(_Form("columns", {f"{name}::values": values, f"{name}::columns": index}))
    return min(choices, key=lambda form: sum(entry.nbytes for entry in form.parts.values()))


def _gaps(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many zeros lie before each nonzero, in the order of memory."""
    places = np.flatnonzero(tensor.detach().cpu().reshape(-1).numpy())
    gaps = np.diff(places, prepend=-1)
    gaps -= 1
    return gaps


def _columns(tensor: Tensor) -> Tensor:
    """Which of dimension 1 are not all zeros."""
    return (tensor != 0).movedim(1, 0).flatten(1).any(1).nonzero().flatten()


def _encode(name: str, tensor: Tensor, form: _Form) -> dict[str, Tensor]:
    tensor = tensor.detach().cpu()
    if form.form == "dense":
        return {name: tensor}
    if form.form == "columns":
        columns = _columns(tensor)
        return {
            f"{name}::values": tensor.index_select(1, columns),
            f"{name}::columns": columns.to(torch.int32),
        }
    flat = tensor.reshape(-1)
    gaps, dtype = _gaps(flat), form.parts[f"{name}::gaps"].dtype
    full = torch.iinfo(dtype).max
    codes = np.full(form.parts[f"{name}::gaps"].numel, full, dtype=str(dtype).removeprefix("torch."))
    # Each value's own code comes after its full ones.
    codes[np.cumsum(gaps // full + 1) - 1] = gaps % full
    return {f"{name}::values": flat[flat != 0], f"{name}::gaps": torch.from_numpy(codes)}


def _decode(reader: Reader, name: str, entry: Entry, form: str) -> Tensor:
    if form == "dense":
        return reader.read(name)
    values, where = (reader.read(part) for part in _parts(name, form))
    damaged = FileError(f"{str(reader.path)!r} is damaged: the places of {name!r} don't fit its shape.")
    try:
        out = torch.zeros(entry.shape, dtype=entry.dtype)
    except (RuntimeError, MemoryError):
        raise FileError(
            f"{str(reader.path)!r}: {name!r} is {entry.nbytes / 1e9:.1f} GB, for which there is no memory."
        ) from None
    if form == "columns":
        columns = where.long()
        if len(columns) and (
            bool((columns.diff() <= 0).any()) or not 0 <= columns[0] <= columns[-1] < out.shape[1]
        ):
            raise damaged
        out[:, columns] = values
        return out
    codes = where.numpy()
    full = np.iinfo(codes.dtype).max
    last = codes != full
    steps = codes.astype(np.int64)
    steps += last
    places = np.cumsum(steps)[last] - 1
    if len(places) != len(values) or (len(places) and places[-1] >= out.numel()):
        raise damaged
    out.view(-1)[torch.from_numpy(places)] = values
    return out


def _check_room(path: Path, needed: int) -> None:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    part = work_of(path).part
    free = shutil.disk_usage(folder).free + (part.stat().st_blocks * 512 if part.exists() else 0)
    if free < needed:
        raise OptxError(
            f"Delta.save: {needed / 1e9:.2f} GB are needed in {str(folder)!r}, and {free / 1e9:.2f} are free."
        )
