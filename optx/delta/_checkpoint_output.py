"""Writing a whole checkpoint: one file, or a folder like the one it came from, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from optx._errors import FileError, OptxError, warn
from optx._safetensors import Entry
from optx.delta._checkpoint_source import Files, Source
from optx.delta._claim import claimed
from optx.delta._safetensors_writer import Writer
from optx.delta._side_files import copy_others
from optx.delta._work_files import Work, check_new, discard, notes, start_anew, work_of

Tensors = Callable[[str], Tensor | Callable[[int, int], Tensor]]
"""Gives a tensor by name; or a function of begin and end that gives its pieces, flat."""


def plan_of(*parts: Any) -> str:
    """A name for a computation: two that would write the same bytes have the same."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_checkpoint(
    out: Path,
    like: Source,
    entries: Mapping[str, Entry],
    tensors: Tensors,
    *,
    plan: str,
    dtype: torch.dtype | None = None,
    others: Source | None = None,
    reshaped: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
    layout: Mapping[str, Mapping[str, Entry]] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write tensors as files laid out like a source's.

    A folder gets the shards, the index and every other file (configuration, tokenizer) of the source's
    folder. It is written under a hidden name and renamed at the end; killed before, the same call goes on
    with the tensor after the last that was safely written. A tensor that can't be made (an `OptxError`) can't
    be made the next time either: then nothing is left behind.

    Args:
        out: a ``.safetensors`` file, or a folder that is not there yet.
        like: whose layout is followed.
        entries: every tensor to write.
        tensors: gives a tensor by name, in the entry's shape and dtype, or a function that gives its pieces.
        plan: names the computation; see `Writer`.
        dtype: what a folder's ``config.json`` is to say; None leaves it.
        others: whose configuration and tokenizer go with these tensors, where it isn't ``like``.
        reshaped: whether ``like``'s don't go with them; a folder without ``others`` is warned of then.
        progress: wraps the names, to show how far it is.
        layout: entries by the name of a folder's file, where they can't be laid out like the source's.
        finish: is given a folder that is whole but for its name, to change its other files.
        metadata: strings for the header, where ``out`` is a file.

    Raises:
        OptxError: ``out`` exists or is being written, or the disk is too small.
    """
    check_new(out)
    with claimed(out):
        _check_room(out, sum(entry.nbytes for entry in entries.values()))
        try:
            if out.suffix == ".safetensors":
                _write_file(out, entries, tensors, plan, progress, metadata)
            else:
                side = _side_folder(out, like, others, reshaped)
                _write_folder(out, like, side, entries, tensors, plan, dtype, progress, layout, finish)
        except OptxError as error:
            if not isinstance(error.__cause__, OSError):  # a disk may have room the next time
                discard(out)
            raise
    return out


def _side_folder(out: Path, like: Source, others: Source | None, reshaped: bool) -> Path | None:
    """The folder whose configuration and tokenizer go with the result."""
    if others is None and not reshaped:
        return like.path if isinstance(like, Files) and like.path.is_dir() else None
    if isinstance(others, Files) and others.path.is_dir():
        return others.path
    if isinstance(like, Files) and like.path.is_dir():
        warn(
            f"{str(out)!r} has tensors of the tuned model's shapes, and the base's configuration and "
            "tokenizer, as no folder of the tuned model is known. Put its own in their place."
        )
        return like.path
    return None


def _write_folder(
    out: Path,
    like: Source,
    side: Path | None,
    entries: Mapping[str, Entry],
    tensors: Tensors,
    plan: str,
    dtype: torch.dtype | None,
    progress: Callable[[Iterable[str]], Iterable[str]],
    layout: Mapping[str, Mapping[str, Entry]] | None,
    finish: Callable[[Path], None],
) -> None:
    work = work_of(out)
    folder = like if isinstance(like, Files) and like.path.is_dir() else None
    files = layout or (_by_file(folder, entries) if folder else {"model.safetensors": entries})
    try:
        _prepare(work, plan)
        for name, content in files.items():
            if not (work.part / name).exists():
                _write_file(work.part / name, content, tensors, plan, progress)
            discard(work.part / name)  # a journal that a kill has left beside a finished file
        if side is not None:
            copy_others(side, work.part, files, dtype)
        if layout is not None:
            write_index(work.part, layout)
        finish(work.part)
        if os.path.lexists(out):
            raise FileError(f"{str(out)!r} could not be written: somebody else has made it meanwhile.")
        os.replace(work.part, out)
        work.journal.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{str(out)!r} could not be written: {error.strerror}.") from error


def _prepare(work: Work, plan: str) -> None:
    """The hidden folder of this plan; what another plan left in it is thrown away."""
    about = {"plan": plan}
    there = os.path.lexists(work.part)
    if there and (notes(work, about) is None or not work.part.is_dir()):
        start_anew(work, about)
        shutil.rmtree(work.part) if work.part.is_dir() else work.part.unlink()
    elif not there:
        start_anew(work, about)
    work.part.mkdir(exist_ok=True)


def _write_file(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Tensors,
    plan: str,
    progress: Callable[[Iterable[str]], Iterable[str]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    try:
        writer = Writer(path, entries, metadata, plan)
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be written: {error.strerror}.") from error
    try:
        for name in progress([name for name in entries if name not in writer.written]):
            made = tensors(name)
            if isinstance(made, Tensor):
                writer.write(name, made)
            else:
                writer.write_pieces(name, made)
        writer.finish()
    except OSError as error:
        writer.close()
        raise FileError(f"{str(path)!r} could not be written: {error.strerror}.") from error
    except BaseException:
        writer.close()
        raise


def _by_file(like: Files, entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The entries by the name of the source's shard; new ones go into the last."""
    files: dict[str, dict[str, Entry]] = {like.place_of(file): {} for file in like.files}
    for name, entry in entries.items():
        file = like.file_of(name) if name in like.entries else like.files[-1]
        files[like.place_of(file)][name] = entry
    return {file: content for file, content in files.items() if content}


def new_layout(entries: Mapping[str, Entry], limit: int = 5_000_000_000) -> dict[str, dict[str, Entry]]:
    """Entries by file, named as transformers does it, each file with ``limit`` bytes at most if it can be."""
    parts: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if parts[-1] and size + entry.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def write_index(folder: Path, layout: Mapping[str, Mapping[str, Entry]]) -> None:
    """Have a folder's index, if it needs one, say which file a tensor is in."""
    for old in folder.glob("*.safetensors.index.json"):
        old.unlink()
    if len(layout) == 1:
        return
    where = {name: file for file, content in layout.items() for name in content}
    total = sum(entry.nbytes for content in layout.values() for entry in content.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _check_room(out: Path, needed: int) -> None:
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    part = work_of(out).part
    parts = part.rglob("*") if part.is_dir() else [part]
    # Blocks and not the size: a file that is begun is as long as its last byte, and may be full of holes.
    written = sum(p.stat().st_blocks * 512 for p in parts if p.is_file())
    free = shutil.disk_usage(folder).free
    if free + written < needed:
        raise OptxError(
            f"out: {needed / 1e9:.2f} GB are needed in {str(folder)!r}, and {free / 1e9:.2f} GB are free."
        )
