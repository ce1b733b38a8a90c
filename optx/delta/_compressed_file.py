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
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from optx._errors import FileError
from optx._files import written_aside
from optx._safetensors import NAMES, Entry, brief, entry_of, parsed
from optx.delta import _bitmask as bitmask
from optx.delta import _golomb as golomb
from optx.delta._checkpoint_source import COMPRESSED
from optx.delta._claim import claimed
from optx.delta._mixed_sum import AllOf
from optx.delta._signs import About, Signs
from optx.delta._work_files import check_new

VERSION = 2
_READ = (1, 2)  # 1 has gap codes alone, which 2 has too
_LARGEST_TABLE = 100_000_000
_HEAD = struct.Struct("<8sII8s")


def describe(signs: Signs, sizes: Mapping[str, int] | None = None) -> str:
    """Everything but the masks, as JSON; ``sizes``: bytes of each payload."""
    about = signs.about
    rows: list[list[Any]] = []
    for name, entry in signs.entries.items():
        row = [name, NAMES[entry.dtype], list(entry.shape), sizes[name] if sizes else 0]
        prints = [about.fingerprints[name]] if name in about.fingerprints else []
        content = [about.contents[name]] if prints and name in about.contents else []
        rows.append([*row, *prints, *content])
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
    """What a header says; a ValueError, KeyError or TypeError where it makes no sense."""
    table = parsed(text)
    rows: list[list[Any]] = table["tensors"]
    entries = {row[0]: entry_of(row[0], {"dtype": row[1], "shape": row[2]}) for row in rows}
    if len(entries) != len(rows):
        raise ValueError("a tensor stands twice in it")
    sizes = {row[0]: row[3] for row in rows}
    tied, prints = dict(table["tied"]), {row[0]: row[4] for row in rows if len(row) > 4}
    contents = {row[0]: row[5] for row in rows if len(row) > 5}
    words = [*entries, *tied, *tied.values(), *prints.values(), *contents.values(), table["compat"]]
    if not all(isinstance(word, str) for word in words):
        raise ValueError("a name in it is none")
    "".join(words).encode()  # half a letter, as JSON can write it, is a ValueError
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes.values()):
        raise ValueError("a size in it is none")
    numbers = ["sigma", "alpha", "density", "kept_mean", *(["start"] if table["start"] is not None else [])]
    found = {name: float(table[name]) for name in numbers}
    if (
        not all(math.isfinite(number) for number in found.values())
        or found["sigma"] < 0
        or found["alpha"] < 0
    ):
        raise ValueError("a scale in it is no number")
    about = About(
        sigma=found["sigma"],
        alpha=found["alpha"],
        density=found["density"],
        kept_mean=found["kept_mean"],
        compat=table["compat"],
        start=found.get("start"),
        fingerprints=prints,
        tied=tied,
        contents=contents,
    )
    return entries, about, sizes


_NONSENSE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


# ---- writing ----------------------------------------------------------------------------------------


def _payload_sizes(signs: Signs) -> dict[str, int]:
    return {
        name: golomb.layout(signs.masks[name], entry.numel)[1] if name in signs.masks else entry.nbytes
        for name, entry in signs.entries.items()
    }


def _header(signs: Signs, sizes: Mapping[str, int]) -> bytes:
    header = zlib.compress(describe(signs, sizes).encode(), 9)
    return _HEAD.pack(COMPRESSED, VERSION, len(header), _digest(VERSION, header)) + header


def _digest(version: int, header: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<II", version, len(header)) + header, digest_size=8).digest()


def file_size(signs: Signs) -> int:
    """Bytes that `write` will write."""
    sizes = _payload_sizes(signs)
    return len(_header(signs, sizes)) + sum(size + 4 for size in sizes.values())


def write(signs: Signs, path: Path) -> Path:
    """Write the file aside, then give it its name."""
    check_new(path, "Compressed.save")
    sizes = _payload_sizes(signs)
    try:
        with claimed(path), written_aside(path) as aside, aside.open("wb") as file:
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
        return file.read(len(COMPRESSED)) == COMPRESSED


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
    if head[:8] != COMPRESSED or len(head) < _HEAD.size:
        raise FileError(f"{str(path)!r} is no compressed delta, or its first bytes are damaged.")
    _, version, length, digest = _HEAD.unpack(head)
    header = file.read(length) if length <= size else b""
    if len(header) != length or _digest(version, header) != digest:
        raise FileError(f"{str(path)!r} is damaged or cut short: its header's checksum differs.")
    if version not in _READ:
        raise FileError(
            f"{str(path)!r} has version {version} of the format; this optx reads 1 to {VERSION}. Update optx."
        )
    try:
        entries, about, sizes = _understand(_unpacked(header))
    except (*_NONSENSE, zlib.error) as error:
        raise FileError(f"{str(path)!r} is damaged: its header makes no sense ({_brief(error)}).") from None
    due = _HEAD.size + length + sum(each + 4 for each in sizes.values())
    if size != due:
        short = next((name for name, end in _ends(sizes, _HEAD.size + length) if end > size), None)
        cut = f" is cut short in {short!r}: it" if short is not None else ""
        raise FileError(f"{str(path)!r}{cut} has {size} bytes; it should have {due}.")
    masks: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, entry in entries.items():
        payload = file.read(sizes[name])
        if struct.pack("<I", zlib.crc32(payload)) != file.read(4):
            raise FileError(f"{str(path)!r} is damaged in {name!r}: its checksum differs.")
        try:
            if entry.dtype.is_floating_point:
                masks[name] = golomb.decode(payload, entry.numel)
            else:
                whole[name] = _plain(payload, entry)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise FileError(f"{str(path)!r} is damaged in {name!r}: {_brief(error)}.") from None
    return Signs(entries, masks, whole, about, ("file", digest.hex()))


def _unpacked(header: bytes) -> str:
    """A few bytes may stand for gigabytes."""
    packer = zlib.decompressobj()
    text = packer.decompress(header, _LARGEST_TABLE)
    if packer.unconsumed_tail or not packer.eof:
        raise ValueError("it is too large or cut short")
    return text.decode()


def _ends(sizes: Mapping[str, int], start: int) -> Iterator[tuple[str, int]]:
    for name, size in sizes.items():
        start += size + 4
        yield name, start


def _plain(payload: bytes, entry: Entry) -> Tensor:
    if len(payload) != entry.nbytes:
        raise ValueError(f"it should be {entry.nbytes} bytes and is {len(payload)}")
    flat = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0).byte()
    if entry.dtype == torch.bool and bool((flat > 1).any()):
        raise ValueError("a truth value is neither 0 nor 1")
    return flat.view(entry.dtype).view(entry.shape)


def _brief(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    shown = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return brief(shown.rstrip("."), quote=False)


def from_state(state: Mapping[str, Any]) -> Signs:
    """The parts of a `Compressed` from its `state_dict`."""
    who = "Compressed.from_state_dict"
    try:
        text = state["compeft"]
        entries, about, _ = _understand(text)
        masks = {name: state["masks"][name] for name, e in entries.items() if e.dtype.is_floating_point}
        whole = {name: state["whole"][name] for name in entries if name not in masks}
    except _NONSENSE as error:
        raise FileError(f"{who}: this is no compressed delta ({brief(repr(error), quote=False)}).") from None
    masks = {name: _sound_mask(name, mask, entries[name].numel, who) for name, mask in masks.items()}
    for name, tensor in whole.items():
        known = isinstance(tensor, Tensor) and (tuple(tensor.shape), tensor.dtype) == (
            entries[name].shape,
            entries[name].dtype,
        )
        if not known or not _has_its_memory(tensor):
            raise FileError(
                f"{who}: {name!r} must be a tensor of {entries[name].dtype} {entries[name].shape}."
            )
    recipe = ("state", hashlib.blake2b(text.encode()).hexdigest(), AllOf(masks), AllOf(whole))
    return Signs(entries, masks, whole, about, recipe)


def _sound_mask(name: str, mask: Any, numel: int, who: str) -> Tensor:
    """A mask as the kernels read it: contiguous, and with no bit that means nothing."""
    words = bitmask.words(numel)
    known = isinstance(mask, Tensor) and tuple(mask.shape) == (2, words) and mask.dtype == torch.int64
    if not known or not _has_its_memory(mask):
        raise FileError(f"{who}: the masks of {name!r} must be int64 {(2, words)}.")
    mask = mask.contiguous()
    past = -1 << (numel % 64) if numel % 64 else 0  # bits of the last word that are no number's
    if words and (bool((mask[0] & mask[1]).any()) or bool((mask[:, -1] & past).any())):
        raise FileError(f"{who}: the masks of {name!r} have bits that mean nothing.")
    return mask


def _has_its_memory(tensor: Tensor) -> bool:
    """Whether there is a number in memory for each of the tensor's: one that was expanded has few."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    return plain and (tensor.is_meta or tensor.untyped_storage().nbytes() >= tensor.nbytes)
