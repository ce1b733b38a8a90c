"""Files of packed weights: safetensors with a tensor's codes under its name.

The header's string ``optx`` is JSON: ``kind`` (``"rf8"``), ``version``, ``tensors`` (of each packed one its
``e_max``, its ``shape`` and the ``dtype`` that it had, as safetensors names it) and ``tied`` (names that
share another's tensor, by name). What is not packed lies there as it is. Codes have a dimension of 1 behind
the weight's own: a plain load would take them for weights in silence, bytes becoming floats, but into
another shape nothing loads. In files of version 1 they have the weight's shape, and ``shape`` is not told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, ShapeError, near
from optx._files import as_path
from optx._rf8 import (
    SERVED,
    Packed,
    check_numbers,
    exponent_of,
    largest,
    pack_into,
    unpack_into,
)
from optx._safetensors import DTYPES, NAMES, Entry, Reader, brief, parsed
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Memory, Source, open_source
from optx.delta._name_filter import floating
from optx.delta._refusals import check_not_quantised
from optx.rf8._pack import tell_of_replaced

_VERSION = 2
Table: TypeAlias = dict[str, tuple[int, torch.dtype]]
"""Of each packed tensor its e_max and dtype."""


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight's codes in a file; torch loads one number of one dimension as one of none."""
    return (*shape, 1) if shape else (1, 1)


def save(
    what: Checkpoint | Mapping[str, Packed | Tensor],
    path: str | PathLike[str],
    *,
    include: str | None = None,
    exclude: str | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> Path:
    """Write weights in RF8 as a safetensors file: a byte for each, and a header.

    A checkpoint is packed on the way, in the memory of a few pieces: it is read twice, once for each tensor's
    largest magnitude. The file is written under a hidden name and renamed; killed, the same call goes on
    where it was. `load` and `load_into` read it; other readers see bytes in a shape that is no weight's, so
    that ``load_state_dict`` refuses them.

    Args:
        what: what `pack` gave; or a module, a state dict, a safetensors file, or a folder of shards.
        path: a ``.safetensors`` file that is not there yet.
        include: regex of the names that are packed, see `pack`.
        exclude: regex of the names that are left as they are.
        progress: wraps the names that are written, as ``tqdm.tqdm`` does.

    Raises:
        OptxError: inf or nan, or another dtype, among what is packed (names it); or the file exists.
        FileError: a file is missing or damaged, or the disk is full.

    Example:
        >>> import os, tempfile, torch, optx
        >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> _ = optx.rf8.save(torch.nn.Linear(64, 64), path)
        >>> optx.rf8.load(path)["weight"].nbytes
        4097
    """
    target = as_path("rf8.save", "path", path)
    if target.suffix != ".safetensors":
        raise OptxError(f"rf8.save: {str(target)!r} must end in .safetensors.")
    if isinstance(what, Mapping) and any(isinstance(one, Packed) for one in what.values()):
        if include is not None or exclude is not None:
            raise OptxError(
                "rf8.save: include and exclude choose what is packed, and these are packed already."
            )
        return _save_packed(cast("Mapping[str, Packed | Tensor]", what), target, progress)
    source = open_source(cast("Checkpoint", what), "what")
    keep = set(floating("rf8.save", source.entries, include, exclude))
    tell_of_replaced("rf8.save", what, keep)
    check_not_quantised("rf8.save", source.entries, source.label, keep.__contains__)
    for name in keep:
        check_numbers("rf8.save", repr(name), torch.empty(0, dtype=source.entries[name].dtype))
    table: Table = {
        name: (_exponent(source, name), entry.dtype) for name, entry in source.entries.items() if name in keep
    }
    return _write(target, source, table, _packing(source, table), progress)


def _save_packed(
    what: Mapping[str, Packed | Tensor], target: Path, progress: Callable[[Iterable[str]], Iterable[str]]
) -> Path:
    source = Memory(
        {name: one.codes if isinstance(one, Packed) else one for name, one in what.items()}, "what"
    )
    table: Table = {name: (one.e_max, one.dtype) for name, one in what.items() if isinstance(one, Packed)}
    for name, first in source.tied.items():
        if table.get(name) != table.get(first):
            raise OptxError(
                f"rf8.save: {name!r} and {first!r} share their codes, and differ in e_max or dtype."
            )
    table = {name: about for name, about in table.items() if name in source.entries}
    return _write(target, source, table, lambda name: _reading(source, name), progress)


def _exponent(source: Source, name: str) -> int:
    most = max((largest(piece.contiguous()) for piece in source.pieces(name)), default=0)
    return exponent_of(most, "rf8.save", repr(name))


def _packing(source: Source, table: Table) -> Callable[[str], Callable[[int, int], Tensor]]:
    def of(name: str) -> Callable[[int, int], Tensor]:
        if name not in table:
            return _reading(source, name)

        def piece(begin: int, end: int) -> Tensor:
            values = source.piece(name, begin, end).contiguous()
            codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
            pack_into(codes, values, table[name][0])
            return codes

        return piece

    return of


def _reading(source: Source, name: str) -> Callable[[int, int], Tensor]:
    return lambda begin, end: source.piece(name, begin, end)


def _write(
    target: Path,
    source: Source,
    table: Table,
    tensors: Callable[[str], Callable[[int, int], Tensor]],
    progress: Callable[[Iterable[str]], Iterable[str]],
) -> Path:
    entries = {
        name: Entry(_stored(entry.shape), torch.uint8) if name in table else entry
        for name, entry in source.entries.items()
    }
    about = {
        "kind": "rf8",
        "version": _VERSION,
        "tensors": {
            name: {"e_max": e_max, "dtype": NAMES[dtype], "shape": source.entries[name].shape}
            for name, (e_max, dtype) in table.items()
        },
        "tied": source.tied,
    }
    plan = plan_of("rf8", source.label, source.state, sorted(table.items(), key=lambda item: item[0]))
    metadata = {"optx": json.dumps(about, separators=(",", ":"))}
    return write_checkpoint(target, source, entries, tensors, plan=plan, metadata=metadata, progress=progress)


# ---- reading --------------------------------------------------------------------------------------------


def load(path: str | PathLike[str]) -> dict[str, Packed | Tensor]:
    """What `save` wrote: packed tensors by name, and the others as they are.

    In memory are the codes, a byte for each weight. `load_into` fills a model tensor by tensor.

    Args:
        path: the file, or a folder with several.

    Raises:
        FileError: there is none, it is damaged, or it is no RF8 file.
        OptxError: path is none.

    Example:
        >>> import os, tempfile, torch, optx
        >>> model, path = torch.nn.Linear(8, 8), os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> _ = optx.rf8.save(model, path)
        >>> torch.equal(optx.rf8.load(path)["bias"], model.bias)
        True
    """
    file = _File("rf8.load", path)
    made = {name: file.read(name) for name in file.entries}
    return {**made, **{name: made[first] for name, first in file.tied.items()}}


def load_into(model: nn.Module, path: str | PathLike[str]) -> None:
    """Give a model the weights of a file, unpacked into its own dtypes and devices, one tensor in memory.

    Args:
        model: whose state dict has the file's names and shapes.
        path: see `load`.

    Raises:
        FileError: the file is missing, damaged or no RF8 file, has not the model's names, or has two
            that differ where the model has one tensor for both.
        ShapeError: a shape differs; names it. In both cases nothing was written.

    Example:
        >>> import os, tempfile, torch, optx
        >>> model, path = torch.nn.Linear(8, 8), os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> rounded = optx.rf8.quantise(model.weight)
        >>> optx.rf8.load_into(model, optx.rf8.save(model, path))
        >>> torch.equal(model.weight, rounded)
        True
    """
    file, own = _File("rf8.load_into", path), model.state_dict(keep_vars=True)
    names = {**{name: name for name in file.entries}, **file.tied}
    for name in names:
        if name not in own:
            raise FileError(
                f"rf8.load_into: the model has no {name!r}, which is in the file. {near(name, own)}"
            )
    for name, tensor in own.items():
        if name not in names:
            raise FileError(f"rf8.load_into: the file has no {name!r}. {near(name, names)}")
        shape = file.entries[names[name]]
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"rf8.load_into: {name!r} has shape {tuple(tensor.shape)} in the model and {shape} in the "
                "file."
            )
    _check_ties(own, names, file)
    for first in file.entries:
        one = file.read(first)
        for name in (name for name, other in names.items() if other == first):
            _fill(own[name].data, one)


def _check_ties(own: Mapping[str, Tensor], names: Mapping[str, str], file: _File) -> None:
    """Raise if one tensor of the model has two in the file that differ: the last would win in silence."""
    by_tensor: dict[int, str] = {}
    for name, tensor in own.items():
        first = by_tensor.setdefault(id(tensor), name)
        if names[first] != names[name] and not _equal(file.read(names[first]), file.read(names[name])):
            raise FileError(
                f"rf8.load_into: {first!r} and {name!r} are one tensor in the model, and two that differ in "
                "the file. Untie them in the model, or save a model in which they are tied."
            )


def _equal(one: Packed | Tensor, other: Packed | Tensor) -> bool:
    if isinstance(one, Packed) and isinstance(other, Packed):
        return one.e_max == other.e_max and torch.equal(one.codes, other.codes)
    return not isinstance(one, Packed) and not isinstance(other, Packed) and torch.equal(one, other)


def _fill(to: Tensor, one: Packed | Tensor) -> None:
    """Write a tensor's numbers into another, which may lie anywhere."""
    if not isinstance(one, Packed):
        to.copy_(one)
    elif to.is_contiguous() and to.dtype in SERVED:
        unpack_into(to, one.codes.to(to.device), one.e_max)
    else:
        to.copy_(one.unpack(torch.float32))


class _File:
    """One RF8 file, or those of a folder.

    Attributes:
        entries: shapes of the tensors, by name.
        tied: names that share another's, by name.
    """

    def __init__(self, who: str, path: str | PathLike[str]) -> None:
        self._files = Files(as_path(who, "path", path))
        self.entries = {name: entry.shape for name, entry in self._files.entries.items()}
        self.tied: dict[str, str] = {}
        self._table: Table = {}
        for reader in self._files.readers:
            table, shapes, tied = _about(reader)
            self.entries.update(shapes)
            for name in tied:
                if name in self.entries or name in self.tied:
                    raise FileError(f"{brief(name)} is in two files of {str(self._files.path)!r}.")
            self._table.update(table)
            self.tied.update(tied)

    def read(self, name: str) -> Packed | Tensor:
        """One tensor."""
        tensor = self._files.read(name)
        if name not in self._table:
            return tensor
        return Packed(tensor.reshape(self.entries[name]), *self._table[name])


def _about(reader: Reader) -> tuple[Table, dict[str, tuple[int, ...]], dict[str, str]]:
    """What a file's header says of its tensors: of packed ones, their shapes, and which are tied.

    Raises:
        FileError: it is no RF8 file, or says what can't be.
    """
    who = f"{str(reader.path)!r}"
    try:
        found: Any = parsed(reader.metadata.get("optx", "{}"))
        kind: Any = found.get("kind")
        if kind != "rf8":
            what = f"optx's file of kind {brief(kind)}" if kind else "plain weights; optx.rf8.save packs them"
            raise FileError(f"{who} is no RF8 file, but {what}.")
        version: Any = found.get("version")
        if version not in range(1, _VERSION + 1):
            raise FileError(
                f"{who} is an RF8 file of version {brief(version)}; this version of optx reads 1 "
                f"to {_VERSION}."
            )
        told: dict[str, Any] = found["tensors"]
        table = {name: _one(name, about, reader) for name, about in told.items()}
        shapes = {name: _shape_of(name, about, reader) for name, about in told.items() if version > 1}
        tied: dict[str, str] = found["tied"]
        for name, first in tied.items():
            if name in reader.entries or first not in reader.entries:
                raise ValueError(f"{brief(name)} is tied to {brief(first)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{who} is damaged: its header says what can't be ({brief(error, quote=False)})."
        ) from None
    return table, shapes, tied


def _one(name: str, about: Any, reader: Reader) -> tuple[int, torch.dtype]:
    if reader.entries[name].dtype != torch.uint8:
        raise ValueError(f"{brief(name)} is {reader.entries[name].dtype}, and codes are bytes")
    packed = Packed(torch.empty(0, dtype=torch.uint8), about["e_max"], DTYPES[about["dtype"]])
    return packed.e_max, packed.dtype


def _shape_of(name: str, about: Any, reader: Reader) -> tuple[int, ...]:
    shape, stored = tuple(about["shape"]), reader.entries[name].shape
    if _stored(shape) != stored:
        raise ValueError(
            f"{brief(name)} has codes of shape {stored}, and a weight of {brief(about['shape'])}"
        )
    return shape
