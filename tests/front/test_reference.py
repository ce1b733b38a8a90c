"""The API reference: what `.ci/docs` builds has no gaps, and a gap is found."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from optx import _catalog

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs() -> Any:
    """The command, as a module."""
    pytest.importorskip("pdoc")
    loader = SourceFileLoader("ci_docs", str(ROOT / ".ci" / "docs"))
    spec = importlib.util.spec_from_loader("ci_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
    return module


def test_every_public_name_says_what_it_is() -> None:
    bare = [name for name, thing in _catalog.public() if callable(thing) and not thing.__doc__]
    assert not bare


def test_the_reference_has_no_gap(docs: Any) -> None:
    pages = [docs.Page(sys.modules[name]) for name in docs.PAGES]
    assert not [line for page in pages for line in docs.missing(page)]
    names = pages[0].members
    assert names.keys() == {name for name, _ in _catalog.public() if "." not in name}
    # Those of its private bases too.
    assert {"dare", "find_q", "between"} <= {member.name for member in names["Delta"].own_members}


def test_a_gap_is_found(docs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somewhere", "Speaks of `sys`, of `found` and of `nowhere.at_all`.")

    def found() -> None: ...

    found.__module__, found.__qualname__ = "somewhere", "found"
    vars(module).update(found=found, __all__=["found"])
    monkeypatch.setitem(sys.modules, "somewhere", module)
    assert docs.missing(docs.Page(module)) == [
        "somewhere speaks of `nowhere.at_all`, which is not there",
        "somewhere.found has no docstring",
    ]


def test_source_limits_and_evidence_become_sections(docs: Any) -> None:
    text = "It does.\n\nSource: here,\nand there.\n\nLimits: none."
    assert docs.sections(text) == "It does.\n\nSource:\n    here,\n    and there.\n\nLimits:\n    none."
