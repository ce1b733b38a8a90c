"""Where a pruned model's weights are 0: of a module, a state dict, or files read a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, check_range, near, warn
from optx._mask_bits import layout, ones, pack, packed_shape
from optx._masked_model import local, named, pruned_by_torch, without_numbers
from optx._names import is_dtensor
from optx._quantised_entries import quantised
from optx._safetensors import Entry, Reader, check_complete, shards

Pruned: TypeAlias = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""A module, a state dict, a safetensors file, or a folder with one or several of them."""

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Source:
    """What masks are taken from.

    Attributes:
        entries: shape and dtype of every tensor, by name.
        read: gives one.
        what: it is, for messages.
        names: of tensors that may be pruned weights, where nobody said which.
    """

    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    what: str
    names: Sequence[str]


def zeros_of(
    pruned: Pruned, names: str | Sequence[str] | None, min_sparsity: float
) -> dict[str, tuple[Tensor, Shape]]:
    """Bits (1: not 0) and shape of every weight that is pruned, by name; see `optx.Masks.of`."""
    check_range("Masks.of", "min_sparsity", min_sparsity, 0.0, 1.0)
    source = _opened(pruned)
    wanted = source.names if names is None else _wanted(names, source)
    least = min_sparsity if names is None else 0.0
    found: dict[str, tuple[Tensor, Shape]] = {}
    empty: list[str] = []
    for name in wanted:
        bits, shape = _bits(name, source.read(name))
        rows, length = layout(shape)
        zeros = rows * length - ones(bits)
        if names is None and zeros == rows * length and zeros:
            empty.append(name)
        elif zeros and zeros >= least * rows * length:
            found[name] = bits, shape
        elif not isinstance(names, str | None):
            raise OptxError(f"Masks.of: {name!r} in {source.what} has no weight that is 0.")
    if not found:
        raise OptxError(
            f"Masks.of: {source.what} is not pruned: of {len(wanted)} weights none has a share of zeros of "
            f"at least {least:g}{_but_for(empty)}. Prune it with optx.prune."
        )
    if empty:
        warn(
            f"Masks.of: {len(empty)} weights have nothing but zeros, as layers that start at 0, and are left "
            f"out: {', '.join(map(repr, empty[:3]))}{', ...' if len(empty) > 3 else ''}. If they were "
            "pruned, give names=."
        )
    return found


def _but_for(empty: Sequence[str]) -> str:
    return f" (but for {len(empty)} with nothing else, as {empty[0]!r})" if empty else ""


def _bits(name: str, weight: Tensor) -> tuple[Tensor, Shape]:
    """A weight's mask on the CPU, whole, and its shape."""
    why = without_numbers(weight)
    if why:
        raise OptxError(f"Masks.of: {name!r} {why}")
    shape = tuple(weight.shape)
    if not is_dtensor(weight):
        return pack(weight.detach() != 0).cpu(), shape
    return _gathered(weight, shape).cpu(), shape


def _gathered(weight: Any, shape: Shape) -> Tensor:
    """Of a sharded weight; every process gets all of it. Sharded by rows, bits are what is sent."""
    from torch.distributed.tensor import DTensor

    mesh, places = weight.device_mesh, weight.placements
    if all(one.is_replicate() or one.is_shard(0) for one in places):
        wide = packed_shape(shape)
        part = pack(local(weight) != 0)
        if part.shape[1] != wide[1]:  # of no rows
            part = part.new_zeros((part.shape[0], wide[1]))
        made = DTensor.from_local(
            part, mesh, places, run_check=False, shape=torch.Size(wide), stride=(wide[1], 1)
        )
        return made.full_tensor()
    ints = (local(weight) != 0).to(torch.uint8)
    stride = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(ints, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)
    return pack(made.full_tensor().bool())


# ---- what they are taken from ----------------------------------------------------------------------------


def _opened(pruned: Any) -> _Source:
    if isinstance(pruned, nn.Module):
        return _in_module(pruned)
    if isinstance(pruned, Mapping):
        for name, tensor in pruned.items():
            if not isinstance(tensor, Tensor):
                raise OptxError(f"Masks.of: {name!r} is a {type(tensor).__name__}, not a tensor.")
        entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in pruned.items()}
        return _of_entries(entries, pruned.__getitem__, "the state dict")
    if isinstance(pruned, str | PathLike):
        return _in_files(Path(pruned).expanduser())
    raise OptxError(
        f"Masks.of: pruned is a {type(pruned).__name__}; it must be a module, a state dict, a safetensors "
        "file, or a folder of them."
    )


def _in_module(model: nn.Module) -> _Source:
    found = dict(_first_names(model))
    for name in found:
        if why := pruned_by_torch(name, found, model):
            raise OptxError(f"Masks.of: {why}")
    entries = {name: Entry(tuple(p.shape), p.dtype) for name, p in found.items()}
    matrices = [name for name, entry in entries.items() if len(entry.shape) >= 2]
    return _Source(entries, found.__getitem__, f"the {type(model).__name__}", matrices)


def _first_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the first of their names; tied ones have several."""
    seen = set[int]()
    for name, p in named(model).items():
        if id(p) not in seen:
            seen.add(id(p))
            yield name, p


def _of_entries(entries: Mapping[str, Entry], read: Callable[[str], Tensor], what: str) -> _Source:
    """A checkpoint, in which buffers (masks of attention among them) are tensors as weights are.

    Raises:
        OptxError: it is quantised; names a weight.
    """
    for name in entries:
        if kind := quantised(name, entries):
            raise OptxError(
                f"Masks.of: {name!r} in {what} belongs to {kind} quantised weights: codes, not numbers. Take "
                "the masks of the checkpoint that it was made of."
            )
    names = [n for n, e in entries.items() if len(e.shape) >= 2 and n.endswith(("weight", "_proj"))]
    return _Source(entries, read, what, names)


def _in_files(path: Path) -> _Source:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise FileError(
            f"Masks.of: {str(path)!r} is a pickle, which can run code when it is opened. Convert it to "
            "safetensors, or load it yourself with torch.load(weights_only=True) and pass the dict."
        )
    if not path.exists():
        raise FileError(f"Masks.of: there is no file or folder {str(path)!r}.")
    where: dict[str, Reader] = {}
    for file in shards(path) if path.is_dir() else [path]:
        reader = Reader(file)
        if "optx" in reader.metadata:
            raise FileError(
                f"Masks.of: {str(file)!r} is a file of optx's own, not a model's weights. If it holds masks: "
                "optx.Masks.load(path)."
            )
        for name in reader.entries:
            if name in where:
                raise FileError(f"Masks.of: {name!r} is in two files of {str(path)!r}.")
            where[name] = reader
    if path.is_dir():
        check_complete(path, where)
    entries = {name: reader.entries[name] for name, reader in where.items()}
    return _of_entries(entries, lambda name: where[name].read(name), repr(str(path)))


def _wanted(names: str | Sequence[str], source: _Source) -> Sequence[str]:
    """The weights that somebody named.

    Raises:
        OptxError: names are none of these, or no regular expression.
    """
    if isinstance(names, str):
        try:
            chosen = [name for name in source.entries if re.fullmatch(names, name)]
        except re.error as error:
            raise OptxError(f"Masks.of: names={names!r} is not a regular expression ({error}).") from None
        if not chosen:
            raise OptxError(
                f"Masks.of: names={names!r} matches no weight of {source.what}. {near(names, source.entries)}"
            )
        return chosen
    for name in names:
        if name not in source.entries:
            raise OptxError(f"Masks.of: {source.what} has no weight {name!r}. {near(name, source.entries)}")
    return list(names)
