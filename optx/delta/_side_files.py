"""What a model's folder holds besides its weights: all that is needed to load it is carried over.

Configuration, tokenizer, chat templates, processors, custom code, and the folders of sentence-transformers.
What is left behind is other weights (they are of another model now) and the state of a training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from optx._errors import FileError, warn
from optx._safetensors import Entry, inside, read_json

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf"),
    *(".ggml", ".ot", ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".tar", ".xml", ".mlmodel"),
    ".index.json",
)
_OTHER_FORMS = ("onnx", "openvino", "original", "coreml", "runs", "__pycache__", "global_step")
_DEPTH = 4
_LARGEST_TABLE = 100_000_000


def side_files(folder: Path) -> Iterator[str]:
    """Names in a model's folder, with folders below it, of what goes with its weights."""
    with_weights = _modules(folder)
    for name in _walk(folder, "", _DEPTH):
        first = name.partition("/")[0]
        # The small weights of a sentence-transformers module are in its own folder, in whatever form.
        if not name.endswith(_WEIGHTS) or (first in with_weights and "/" in name):
            yield name


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    for path in sorted((folder / prefix).iterdir()):
        name = f"{prefix}{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield name
        elif path.is_dir() and not path.is_symlink() and depth and not _other_form(path):
            yield from _walk(folder, f"{name}/", depth - 1)


def _other_form(path: Path) -> bool:
    """Whether a folder holds other weights: another format's, or a training's checkpoint."""
    return path.name in _OTHER_FORMS or path.name.startswith(("checkpoint-", "global_step"))


def _modules(folder: Path) -> set[str]:
    """The folders of a sentence-transformers model's modules."""
    try:
        table = read_json(folder / "modules.json", 1_000_000)
        paths = [module["path"] for module in table]
        return {inside(folder, path, "modules.json").name for path in paths if path}
    except (FileError, TypeError, KeyError):
        return set()


def copy_others(
    source: Path,
    target: Path,
    files: Mapping[str, Mapping[str, Entry]],
    dtype: torch.dtype | None,
) -> None:
    """Copy what goes with a model's weights, and write the index of these.

    Args:
        source: the folder of a model.
        target: another, in which the weights lie already.
        files: the tensors of each of its files.
        dtype: what its ``config.json`` is to say; None leaves it.
    """
    for name in side_files(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and name in files:
            continue
        _copy(source / name, place)
        if name.endswith(_WEIGHTS):
            warn(
                f"{name!r} is copied from {str(source)!r} as it is: it is no part of the model that changes."
            )
    _write_index(source, target, files)
    if dtype is not None and (target / "config.json").exists():
        _tell_dtype(target / "config.json", dtype)


def _copy(source: Path, target: Path) -> None:
    """A copy that is on the disk when this returns."""
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())


def _write_index(source: Path, target: Path, files: Mapping[str, Mapping[str, Entry]]) -> None:
    """Where each tensor is, under the name that the source's index has."""
    if len(files) == 1 and "-of-" not in next(iter(files)):
        return
    indices = sorted(source.glob("*.safetensors.index.json"))
    named = [index for index in indices if index.name == "model.safetensors.index.json"] or indices
    if not named:
        return
    index: dict[str, Any] = read_json(named[0], _LARGEST_TABLE)
    where = {name: file for file, content in files.items() for name in content}
    # In the source's order, new tensors after the others.
    order = {name: number for number, name in enumerate(index["weight_map"])}
    index["weight_map"] = {n: where[n] for n in sorted(where, key=lambda n: order.get(n, len(order)))}
    told = index.get("metadata")
    total = sum(entry.nbytes for content in files.values() for entry in content.values())
    index["metadata"] = {**(told if isinstance(told, dict) else {}), "total_size": total}
    (target / named[0].name).write_text(json.dumps(index, indent=2) + "\n")


def _tell_dtype(path: Path, dtype: torch.dtype) -> None:
    """Have a transformers configuration, and those inside it, name another dtype."""
    name = str(dtype).removeprefix("torch.")

    def changed(value: Any, top: bool = False) -> Any:
        if not isinstance(value, dict):
            return value
        table = cast(dict[str, Any], value)
        keys = {"dtype", "torch_dtype"} & table.keys() or ({"torch_dtype"} if top else set())
        return {key: changed(inner) for key, inner in table.items()} | dict.fromkeys(keys, name)

    config = read_json(path, _LARGEST_TABLE)
    path.write_text(json.dumps(changed(config, top=True), indent=2) + "\n")
