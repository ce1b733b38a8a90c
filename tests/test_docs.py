"""Every example in the documentation runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import optx

ROOT = Path(__file__).parent.parent
PUBLIC = sorted(name for name in vars(optx) if not name.startswith("_"))
PROTOCOLS = (optx.Transform, optx.Injection, optx.Composite, optx.MergeMethod)
METHODS = [
    name
    for name in PUBLIC
    if inspect.isclass(thing := getattr(optx, name))
    and issubclass(thing, PROTOCOLS)
    and thing not in PROTOCOLS
]


def documented() -> list[doctest.DocTest]:
    """The examples of every module of optx (not of its kernels and recipes)."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found: dict[str, doctest.DocTest] = {}
    for info in pkgutil.walk_packages(optx.__path__, "optx."):
        if not info.name.startswith(("optx.kernels", "optx.recipes")):
            module = importlib.import_module(info.name)
            found.update({test.name: test for test in finder.find(module, info.name) if test.examples})
    return list(found.values())


@pytest.mark.parametrize("example", documented(), ids=lambda test: test.name)
def test_docstring_example_runs(example: doctest.DocTest) -> None:
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def _class_or_function(name: str) -> Any:
    value = getattr(optx, name)
    return value if inspect.isclass(value) or inspect.isfunction(value) else None


@pytest.mark.parametrize("name", [n for n in PUBLIC if _class_or_function(n)])
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(_class_or_function(name)), f"optx.{name} has no docstring"


@pytest.mark.parametrize("name", [*METHODS, "wrap", "attach", "StableMaxCrossEntropy", "rule"])
def test_method_shows_how_to_call_it(name: str) -> None:
    text = inspect.getdoc(getattr(optx, name)) or ""
    assert ">>>" in text
    assert "Args:" in text or not inspect.signature(getattr(optx, name)).parameters


def test_readme_transform_runs_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [block] = [b for b in blocks if "class Clip" in b]
    (tmp_path / "readme_clip.py").write_text("import torch\nmodel = torch.nn.Linear(3, 2)\n" + block)
    monkeypatch.syspath_prepend(tmp_path)
    readme: Any = importlib.import_module("readme_clip")
    model, opt = readme.model, readme.opt
    start = model.weight.detach().clone()
    (1000.0 * model(torch.ones(1, 3))).sum().backward()
    opt.step()
    assert not torch.equal(model.weight, start)
    assert [t.name for t in opt.transforms] == ["clip", "perp_grad"]
    assert opt.plan()[0].path == "fused cpu"


def test_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in METHODS if f"optx.{name}(" not in text]
    assert not missing
