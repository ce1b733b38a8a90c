"""The versions that CI tries are the lowest that pyproject.toml allows."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWEST = ROOT / ".ci" / "lowest.txt"
NOT_TRIED = {"torch", "triton"}  # of older ones there is no small build


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0 is 2.13."""
    found = [int(n) for n in version.partition("+")[0].split(".")]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def bounds() -> dict[str, str]:
    """The lower bound of all that optx and its extras for users need, and of PEFT."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = {
        name: re.search(rf"^{name} = \[(.*?)\](?: *#.*)?$", text, re.DOTALL | re.MULTILINE)
        for name in ("dependencies", "recipes", "merge", "test")
    }
    found: dict[str, str] = {}
    for extra, entry in lists.items():
        assert entry is not None, extra
        for name, bound in re.findall(r'"([\w.-]+)(?:\[\w+\])?>=([\d.]+)', entry[1]):
            if extra != "test" or name == "peft":
                found[name] = bound
    return found


def tried() -> dict[str, str]:
    lines = [line for line in LOWEST.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)  # type: ignore[misc]


def test_what_ci_tries_is_the_lower_bound_of_everything() -> None:
    wanted = {name: numbers(bound) for name, bound in bounds().items() if name not in NOT_TRIED}
    assert len(wanted) > 8
    assert {name: numbers(version) for name, version in tried().items()} == wanted


def test_the_lowest_environment_has_these_versions() -> None:
    """In the other, newest ones: there it only says that none is below its bound."""
    lowest = Path(sys.prefix).name == "lowest"
    for name, version in tried().items():
        try:
            here = numbers(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            pytest.fail(f"{name} is not installed")
        assert here == numbers(version) if lowest else here >= numbers(version), name
