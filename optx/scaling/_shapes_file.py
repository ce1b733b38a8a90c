"""The JSON file of `Shapes`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from optx._errors import FileError
from optx._files import written_aside
from optx.scaling._width import KINDS, HeadWidth, Width

FORMAT = "optx.scaling.shapes"
VERSION = 1


def write(path: str | PathLike[str], widths: Sequence[Width], heads: Mapping[str, HeadWidth]) -> None:
    """One line a parameter, so that a change shows in a diff."""
    rows = ",\n  ".join(json.dumps(dataclasses.asdict(width)) for width in widths)
    lines = ",\n  ".join(
        f"{json.dumps(path)}: {json.dumps(dataclasses.asdict(h))}" for path, h in heads.items()
    )
    with written_aside(path) as aside:
        aside.write_text(
            f'{{"format": "{FORMAT}", "version": {VERSION},\n "parameters": [\n  {rows}\n ],\n'
            f' "attention": {{\n  {lines}\n }}}}\n',
            encoding="utf-8",
        )


def read(path: str | PathLike[str]) -> tuple[list[Width], dict[str, HeadWidth]]:
    """What `write` wrote.

    Raises:
        FileError: it is none of these files, damaged, or of a later version.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"Shapes.load: {str(path)!r} is no JSON file ({error}).") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:  # pyright: ignore
        raise FileError(f"Shapes.load: {str(path)!r} holds no shapes; give a file that Shapes.save wrote.")
    if found["version"] != VERSION:  # pyright: ignore[reportUnknownVariableType]
        raise FileError(
            f"Shapes.load: {str(path)!r} has version {found['version']!r} of this format; this optx knows "
            f"version {VERSION}."
        )
    try:
        widths = [_width(row) for row in found["parameters"]]  # pyright: ignore
        heads = {str(name): _head(row) for name, row in found["attention"].items()}  # pyright: ignore
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"Shapes.load: {str(path)!r} is damaged ({error!r}).") from None
    return widths, heads


def _width(row: dict[str, Any]) -> Width:
    if row["kind"] not in KINDS:
        raise ValueError(f"{row['name']}: kind {row['kind']!r}")
    fan_in, fan_out = float(row["fan_in"]), float(row["fan_out"])
    if not (0 < fan_in < float("inf") and 0 < fan_out < float("inf")):
        raise ValueError(f"{row['name']}: fans {fan_in} and {fan_out}")
    first, second = row["base_fans"]
    return Width(
        str(row["name"]),
        _sizes(row["shape"]),
        _sizes(row["base_shape"]),
        row["kind"],
        fan_in,
        fan_out,
        tuple(map(str, row["tied"])),
        (int(first), int(second)),
    )


def _sizes(sizes: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)


def _head(row: dict[str, Any]) -> HeadWidth:
    scale = row["base_scale"]
    return HeadWidth(int(row["width"]), int(row["base_width"]), None if scale is None else float(scale))
