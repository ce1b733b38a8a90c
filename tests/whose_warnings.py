"""Warnings that optx or its tests raise or cause are errors; those between other libraries are listed.

A warning is ours if Python attributes it to a file of ours, or if what warned was called by a file of ours:
a deprecated argument that we pass is warned of inside the other library, often under its own name. Everything
else goes to pytest's summary, so that a new version of a dependency that deprecates what another dependency
does breaks nothing here. What a hook of ours hands on, without being on the stack, is not seen.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from optx._cache import cache_root

ROOT = Path(__file__).parents[1]
_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/(.*)")
_SPEAKS_OF = re.compile("warn|deprecat", re.IGNORECASE)


def ours(filename: str) -> bool:
    """optx, its tests, or a kernel that it wrote into its cache."""
    path = Path(filename)
    if installed := _INSTALLED.match(path.as_posix()):
        return installed[1].startswith("optx/")
    written = any(part.startswith("optx-kernels-") for part in path.parts)
    return written or path.is_relative_to(ROOT) or path.is_relative_to(cache_root())


def caused_by_us(frame: FrameType | None) -> bool:
    """Whether what warns at ``frame`` was called by a file of ours."""
    frames = (each for each in _outward(frame) if not _passes_on(each))
    for each in frames:
        if ours(each.f_code.co_filename):
            return True
        if "_pytest" in Path(each.f_code.co_filename).parts:
            return False  # pytest.warns() hands on what it did not match: the stack is gone
        if not _SPEAKS_OF.search(each.f_code.co_name):  # else warn_once() and the like, for their callers
            break
    else:
        return False
    if not _SPEAKS_OF.search(" ".join(each.f_code.co_names)):
        return False  # it called C code (torch's, NumPy's), which warned and has no frame of its own
    told = next(frames, None)
    return told is not None and ours(told.f_code.co_filename)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    """The stack from where a warning was issued, without decorators: those stand for what they wrap."""
    wrapped: set[Any] = set()
    while frame is not None:
        held = {getattr(frame.f_locals.get(name), "__code__", None) for name in frame.f_code.co_freevars}
        if not held & wrapped:
            yield frame
            wrapped.clear()
        wrapped.add(frame.f_code)
        frame = frame.f_back


def _passes_on(frame: FrameType) -> bool:
    """Python's own files, generated code, and torch's way from calling a module to its forward."""
    filename = Path(frame.f_code.co_filename).as_posix()
    if filename.startswith("<") or filename.endswith("torch/nn/modules/module.py"):
        return True
    return Path(filename).is_relative_to(_STDLIB) and not _INSTALLED.match(filename)


@contextmanager
def judged() -> Generator[None]:
    """Raise what is ours; hand on the rest, once each."""
    listed: set[tuple[Any, ...]] = set()
    hand_on = warnings.showwarning

    def judge(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if ours(filename) or caused_by_us(sys._getframe(1)):
            raise message
        key = (str(message), category, filename, lineno)
        if key not in listed:
            listed.add(key)
            hand_on(message, category, filename, lineno, *more)

    warnings.showwarning = judge
    try:
        yield
    finally:
        warnings.showwarning = hand_on


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Inside of pytest's own hook, which records."""
    with judged():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """As above, for what the tests import."""
    with judged():
        return (yield)
