"""The file of a compressed delta, whole or refused.

Little-endian throughout: 8 bytes ``optx-cpf``; uint32: the format's version; uint32: length of the header;
8 bytes: blake2b of version, length and header; the header, JSON packed by zlib; then per tensor, in the
header's order, a payload (Golomb codes, see `optx.delta._golomb`, or the plain bytes of an integer tensor)
followed by its CRC-32. The header names alpha, sigma, their product, density, and for each tensor: name,
dtype (of safetensors), shape, bytes of the payload, and the base's fingerprint. The codes' parameters stand
in the payloads, one per block.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from optx._errors import FileError, OptxError
from optx._files import written_aside
from optx._safetensors import DTYPES, NAMES, Entry
from optx.delta import _bitmask as bitmask
from optx.delta import _golomb as golomb
from optx.delta._signs import About, Signs

MAGIC, VERSION = b"optx-cpf", 2
_READ = (1, 2)  # 1 has gap codes alone, which 2 has too
_HEAD = struct.Struct("<8sII8s")


def describe(signs: Signs, sizes: Mapping[str, int] | None = None) -> str:
    """Everything but the masks, as JSON; ``sizes``: bytes of each payload."""
    about = signs.about
    rows: list[list[Any]] = []
    for name, entry in signs.entries.items():
        row = [name, NAMES[entry.dtype], list(entry.shape), sizes[name] if sizes else 0]
        rows.append([*row, about.fingerprints[name]] if name in about.fingerprints else row)
    table = {
        "alpha": about.alpha,
        "sigma": about.sigma,
        "scale": about.scale,
        "density": about.density,
        "kept_mean": about.kept_mean,
        "compat": about.compat,
        "start": about.start,
        "tied": dict(about.tied),
        "tensors": rows,
    }
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False)


def _understand(text: str) -> tuple[dict[str, Entry], About, dict[str, int]]:
    table = json.loads(text)
    rows = table["tensors"]
    entries = {row[0]: Entry(tuple(map(int, row[2])), DTYPES[row[1]]) for row in rows}
    about = About(
        sigma=float(table["sigma"]),
        alpha=float(table["alpha"]),
        density=float(table["density"]),
        kept_mean=float(table["kept_mean"]),
        compat=str(table["compat"]),
        start=None if table["start"] is None else float(table["start"]),
        fingerprints={row[0]: row[4] for row in rows if len(row) > 4},
        tied=dict(table["tied"]),
    )
    return entries, about, {row[0]: int(row[3]) for row in rows}


# ---- writing ----------------------------------------------------------------------------------------


def _payload_sizes(signs: Signs) -> dict[str, int]:
    return {
        name: golomb.layout(signs.masks[name], entry.numel)[1] if name in signs.masks else entry.nbytes
        for name, entry in signs.entries.items()
    }


def _header(signs: Signs, sizes: Mapping[str, int]) -> bytes:
    header = zlib.compress(describe(signs, sizes).encode(), 9)
    return _HEAD.pack(MAGIC, VERSION, len(header), _digest(VERSION, header)) + header


def _digest(version: int, header: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<II", version, len(header)) + header, digest_size=8).digest()


def file_size(signs: Signs) -> int:
    """Bytes that `write` will write."""
    sizes = _payload_sizes(signs)
    return len(_header(signs, sizes)) + sum(size + 4 for size in sizes.values())


def write(signs: Signs, path: Path) -> Path:
    """Write the file aside, then give it its name."""
    if path.exists():
        raise OptxError(f"Compressed.save: {str(path)!r} exists already. Give another name, or delete it.")
    sizes = _payload_sizes(signs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, aside.open("wb") as file:
            file.write(_header(signs, sizes))
            for name in signs.entries:
                payload = _payload(signs, name)
                assert len(payload) == sizes[name], name
                file.write(payload + struct.pack("<I", zlib.crc32(payload)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be written: {error.strerror}.") from error
    return path


def _payload(signs: Signs, name: str) -> bytes:
    if name in signs.masks:
        return golomb.encode(signs.masks[name], signs.entries[name].numel)
    flat = signs.whole[name].detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


# ---- reading ----------------------------------------------------------------------------------------


def is_compressed(path: Path) -> bool:
    """Whether a file is, or was before some damage, one that `write` wrote."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> Signs:
    """The parts of a `Compressed`."""
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be read: {error.strerror}.") from error


def _read(file: BinaryIO, path: Path) -> Signs:
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD.size)
    if head[:8] != MAGIC or len(head) < _HEAD.size:
        raise FileError(f"{str(path)!r} is no compressed delta, or its first bytes are damaged.")
    _, version, length, digest = _HEAD.unpack(head)
    header = file.read(length) if length <= size else b""
    if len(header) != length or _digest(version, header) != digest:
        raise FileError(f"{str(path)!r} is damaged or cut short: its header's checksum differs.")
    if version not in _READ:
        raise FileError(
            f"{str(path)!r} has version {version} of the format; this optx reads 1 to {VERSION}. Update optx."
        )
    entries, about, sizes = _understand(zlib.decompress(header).decode())
    due = _HEAD.size + length + sum(each + 4 for each in sizes.values())
    masks: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, entry in entries.items():
        payload = file.read(sizes[name])
        check = file.read(4)
        if len(check) < 4:
            raise FileError(f"{str(path)!r} is cut short in {name!r}: it has {size} bytes instead of {due}.")
        if struct.pack("<I", zlib.crc32(payload)) != check:
            raise FileError(f"{str(path)!r} is damaged in {name!r}: its checksum differs.")
        try:
            if entry.dtype.is_floating_point:
                masks[name] = golomb.decode(payload, entry.numel)
            else:
                whole[name] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(entry.dtype)
                whole[name] = whole[name].view(entry.shape)
        except (ValueError, RuntimeError) as error:
            raise FileError(f"{str(path)!r} is damaged in {name!r}: {error}.") from None
    if size != due:
        raise FileError(f"{str(path)!r} has {size} bytes; it should have {due}.")
    return Signs(entries, masks, whole, about, ("file", digest.hex()))


def from_state(state: Mapping[str, Any]) -> Signs:
    """The parts of a `Compressed` from its `state_dict`."""
    try:
        text = state["compeft"]
        entries, about, _ = _understand(text)
        masks = {name: state["masks"][name] for name, e in entries.items() if e.dtype.is_floating_point}
        whole = {name: state["whole"][name] for name in entries if name not in masks}
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"Compressed.from_state_dict: this is no compressed delta ({error!r}).") from None
    for name, mask in masks.items():
        wanted = (2, bitmask.words(entries[name].numel))
        if tuple(mask.shape) != wanted or mask.dtype != torch.int64:
            raise FileError(f"Compressed.from_state_dict: the masks of {name!r} must be int64 {wanted}.")
    return Signs(entries, masks, whole, about, ("state", hashlib.blake2b(text.encode()).hexdigest()))
