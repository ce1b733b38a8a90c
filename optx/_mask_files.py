"""The file of masks: safetensors, a uint8 tensor of bits a weight, and their shapes in the header.

The header's string ``optx`` is JSON: ``kind`` (``"masks"``), ``version``, and ``shapes`` by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from optx._errors import FileError
from optx._files import written_aside
from optx._mask_bits import packed_shape
from optx._safetensors import Reader, brief, parsed

_VERSION = 1

Shapes = dict[str, tuple[int, ...]]


def write_masks(path: str | PathLike[str], bits: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
    """Write bits and shapes beside the target, and rename the file."""
    from safetensors.torch import save_file

    about = {"kind": "masks", "version": _VERSION, "shapes": {name: list(s) for name, s in shapes.items()}}
    with written_aside(path) as aside:
        save_file(dict(bits), aside, metadata={"optx": json.dumps(about), "format": "pt"})


def read_masks(path: str | PathLike[str]) -> tuple[dict[str, Tensor], Shapes]:
    """What `write_masks` wrote, in its order; what a stranger wrote is looked at before it is read.

    Raises:
        FileError: the file is missing, damaged, or holds no masks.
    """
    reader = Reader(path)
    if "optx" not in reader.metadata:
        raise FileError(
            f"Masks.load: {str(path)!r} is a safetensors file without masks. If it is a pruned model: "
            "optx.Masks.of(path)."
        )
    try:
        shapes = _shapes(parsed(reader.metadata["optx"]))
    except ValueError as error:
        raise FileError(f"Masks.load: {str(path)!r} holds no masks ({brief(error, quote=False)}).") from None
    if shapes.keys() != reader.entries.keys():
        odd = sorted(shapes.keys() ^ reader.entries.keys())[0]
        raise FileError(
            f"Masks.load: {str(path)!r} is damaged: {brief(odd)} has bits or a shape, but not both."
        )
    for name, entry in reader.entries.items():
        if entry.shape != packed_shape(shapes[name]):  # the dtype is looked at where they are taken
            raise FileError(
                f"Masks.load: {str(path)!r} is damaged: the bits of {brief(name)} have shape {entry.shape}; "
                f"of a weight of shape {shapes[name]} they have {packed_shape(shapes[name])}."
            )
    return {name: reader.read(name) for name in shapes}, shapes


def _shapes(about: Any) -> Shapes:
    """The shapes by name, of a header's string."""
    if not isinstance(about, dict) or about.get("kind") != "masks":
        kind = about.get("kind") if isinstance(about, dict) else None
        raise ValueError(f"its kind is {brief(kind)}")
    if about.get("version") != _VERSION:
        raise ValueError(f"its version is {brief(about.get('version'))}; this optx reads {_VERSION}")
    shapes: Any = about.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError("it has no table of shapes")
    for name, shape in shapes.items():
        sizes = isinstance(shape, list) and len(shape) <= 64
        if not sizes or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
            raise ValueError(f"the shape of {brief(name)} is {brief(shape)}")
    return {name: tuple(shape) for name, shape in shapes.items()}
