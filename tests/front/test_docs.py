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
from safetensors.torch import save_file
from torch import nn

import optx

ROOT = Path(__file__).parents[2]
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


def test_the_guides_transform_runs_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / ".github/CONTRIBUTING.md").read_text(), flags=re.DOTALL
    )
    [block] = [b for b in blocks if "class Clip" in b]
    (tmp_path / "guide_clip.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    readme: Any = importlib.import_module("guide_clip")
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


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that has what they ask for, in a folder of checkpoints with the names that they use."""
    text = (ROOT / "README.md").read_text()
    diff = re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    blocks = ["\n".join(line[2:] for line in block.splitlines()) for block in diff]
    blocks += re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})})
    for i, name in enumerate(("base", "tuned", "a", "b")):
        (tmp_path / name).mkdir()
        tensors = {key: t.detach() + 0.1 * i * torch.randn_like(t) for key, t in model.state_dict().items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    names: dict[str, Any] = {"torch": torch, "nn": nn, "optx": optx, "model": model}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()
