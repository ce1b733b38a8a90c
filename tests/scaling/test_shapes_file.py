"""The file of shapes that somebody has edited or damaged: told, or read as what it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import optx
from optx.scaling import Shapes

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1.5, float("nan"), float("inf"), "x", "1", [], [1], [1, 2, 3], {}),
    *({"a": 1}, 10**400, [None], ["a"]),
)


def tied(width: int) -> nn.Module:
    model = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 11, bias=False))
    model[2].weight = model[0].weight  # pyright: ignore[reportArgumentType]
    return model


def places(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if here:
        yield here
    if isinstance(data, dict | list):
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*here, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    new = inner = copy.deepcopy(data)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return new


def test_every_place_holds_what_it_must_or_is_told() -> None:
    shapes = optx.scaling.shapes(tied(64), base=tied(16))
    data = json.loads(json.dumps(shapes.as_data()))
    read = 0
    for place in places(data):
        for value in VALUES:
            try:
                found = Shapes.from_data(changed(data, place, value))
            except optx.FileError:
                continue
            print(found)
            read += 1
            written = json.loads(json.dumps(found.as_data()))  # nothing was taken for something else
            assert written == changed(data, place, value), (place, value)
    assert read  # names and ratios are the user's


@pytest.mark.parametrize(("kind", "fan"), [("input", "fan_in"), ("output", "fan_out"), ("scalar", "fan_out")])
def test_a_ratio_on_a_side_that_does_not_grow(kind: str, fan: str) -> None:
    data = optx.scaling.shapes(tied(64), base=tied(16)).as_data()
    data["parameters"][1] |= {"kind": kind, "fan_in": 1.0, "fan_out": 1.0, fan: 4.0}
    with pytest.raises(optx.FileError, match="grows on a side where that doesn't"):
        Shapes.from_data(data)


def test_a_file_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text("[" * 200_000)
    with pytest.raises(optx.FileError, match="is no JSON file"):
        Shapes.load(tmp_path / "shapes.json")


def test_names_with_braces_and_other_digits_are_shown() -> None:
    def make(width: int) -> nn.Module:
        layers = {"{}": nn.Linear(8, width), "{a}": nn.Linear(8, width), "\u00b2": nn.Linear(8, width)}
        return nn.ModuleDict(layers)

    shown = repr(optx.scaling.shapes(make(8), base=make(4)))
    assert all(f"{name}.weight" in shown for name in ("{}", "{a}", "\u00b2"))
