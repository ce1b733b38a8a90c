"""These tests run Triton kernels in its interpreter, which has to be chosen before Triton is imported."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """A device gives inf and nan without a word; numpy, on which the interpreter runs, warns."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _language_is_replaced_once_a_launch() -> Iterator[None]:
    """Triton's interpreter puts its own functions into `triton.language` at each call of a device function.

    All that it finds there from the second call of a launch on is what it put there at the first. Looking
    for it took two fifths of the time of these tests.
    """
    from triton import language
    from triton.runtime import interpreter

    inner: Any = interpreter
    replace, scope = inner._patch_lang, getattr(inner, "_LangPatchScope", None)
    if scope is None:  # releases that never take it back
        yield
        return
    restore, done = scope.restore, set[tuple[bool, ...]]()

    def once(function: Any) -> Any:
        seen = function.__globals__
        held = tuple(
            any(seen.get(name) is one for name in ("tl", "core")) for one in (language, language.core)
        )
        if any(held) and held in done:
            return scope()
        done.add(held)
        return replace(function)

    def take_back(changes: Any) -> None:
        done.clear()
        restore(changes)

    patch = pytest.MonkeyPatch()
    patch.setattr(inner, "_patch_lang", once)
    patch.setattr(scope, "restore", take_back)
    yield
    patch.undo()
