"""The transforms that the documentation writes, as modules of their own: what it shows is what is tested."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any


def documented(thing: Any, folder: Path) -> ModuleType:
    """The imports, rules and classes in the examples of something's docstring."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    parts = [e.source for e in examples if e.source.startswith(("import", "@", "class"))]
    path = folder / f"documented_{thing.__name__}.py"
    path.write_text("\n".join(parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def longest(thing: Any) -> int:
    """How many lines the longest transform in a docstring takes, with its rules."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    lengths, lines = [0], 0
    for source in (e.source for e in examples):
        lines += source.count("\n") if source.startswith(("@", "class")) else 0
        if source.startswith("class"):
            lengths.append(lines)
            lines = 0
    return max(lengths)
