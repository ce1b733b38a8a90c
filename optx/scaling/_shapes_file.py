"""The JSON of `Shapes`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from optx._errors import FileError
from optx._files import written_aside
from optx.scaling._width import KINDS, HeadWidth, Width

FORMAT = "optx.scaling.shapes"
VERSION = 1

Contents = tuple[list[Width], dict[str, HeadWidth], dict[str, float]]
"""Parameters, attention's heads and readouts."""


def as_data(
    widths: Iterable[Width], heads: Mapping[str, HeadWidth], readouts: Mapping[str, float]
) -> dict[str, Any]:
    """Lists, dicts, strings and numbers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "parameters": [_listed(dataclasses.asdict(width)) for width in widths],
        "attention": {path: dataclasses.asdict(head) for path, head in heads.items()},
        "readouts": dict(readouts),
    }


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


def write(path: str | PathLike[str], data: Mapping[str, Any]) -> None:
    """One line a parameter, so that a change shows in a diff."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["parameters"])
    rest = (f" {json.dumps(key)}: {json.dumps(data[key])}" for key in ("attention", "readouts"))
    head = f'{{"format": "{FORMAT}", "version": {VERSION},\n "parameters": [\n{rows}\n ],\n'
    with written_aside(path) as aside:
        aside.write_text(head + ",\n".join(rest) + "}\n", encoding="utf-8")


def read(path: str | PathLike[str]) -> Contents:
    """What `write` wrote.

    Raises:
        FileError: it is none of these files, damaged, or of a later version.
    """
    where = f"Shapes.load: {str(path)!r}"
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is no JSON file ({error}).") from None
    return from_data(found, where)


def from_data(data: Any, where: str) -> Contents:
    """What `as_data` gave; ``where`` it was found, for errors."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise FileError(f"{where} holds no shapes; give what Shapes.save wrote.")
    found: dict[str, Any] = data
    if found.get("version") != VERSION:
        raise FileError(f"{where} has version {found.get('version')!r}; this optx knows version {VERSION}.")
    try:
        widths = [_width(row) for row in found["parameters"]]
        heads = {str(path): _head(row) for path, row in found["attention"].items()}
        readouts = {str(path): _positive(value) for path, value in found["readouts"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(f"{where} is damaged ({error!r}).") from None
    names = [name for width in widths for name in (width.name, *width.tied)]
    if len(set(names)) < len(names) or not names:
        raise FileError(f"{where} is damaged: it has no parameters, or one twice.")
    return widths, heads, readouts


def _width(row: dict[str, Any]) -> Width:
    first, second = (_size(fan, 1) for fan in row["base_fans"])
    width = Width(
        _name(row["name"]),
        tuple(map(_size, row["shape"])),
        tuple(map(_size, row["base_shape"])),
        row["kind"],
        _positive(row["fan_in"]),
        _positive(row["fan_out"]),
        tuple(map(_name, _list(row["tied"]))),
        (first, second),
    )
    if width.kind not in KINDS or len(width.shape) != len(width.base_shape):
        raise ValueError(width.name)
    grows = (width.kind in ("matrix", "output"), width.kind in ("matrix", "input", "vector"))
    if any(
        ratio != 1.0 and not side for ratio, side in zip((width.fan_in, width.fan_out), grows, strict=True)
    ):
        raise ValueError(f"{width.name!r} is {width.kind} and grows on a side where that doesn't")
    return width


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):  # a saved injection's options are read with tuples
        raise TypeError(f"{value!r} is no list")
    return cast("list[Any]", value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no name")
    return value


def _size(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TypeError(f"{value!r} is no size")
    return value


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)


def _head(row: dict[str, Any]) -> HeadWidth:
    scale = row["base_scale"]
    width, base_width = (_size(row[key], 1) for key in ("width", "base_width"))
    return HeadWidth(width, base_width, None if scale is None else _positive(scale))
