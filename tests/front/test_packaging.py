"""Installed, optx is found whole: from any folder, by a type checker too, and in a wheel."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import optx

ROOT = Path(__file__).parents[2]
USE = """
import optx
from optx.kernels.step.program import Program
from optx.recipes import finetune

def passes(program: Program) -> int:
    return len(program.levels)

wrapped: optx.Wrapped = optx.wrap
"""


def test_a_folder_of_the_same_name_does_not_hide_it(tmp_path: Path) -> None:
    """As above a clone, which git names optx: Python is started where that folder lies."""
    (tmp_path / "optx").mkdir()
    code = "import optx, optx.kernels.cpu, optx.recipes; print(optx.wrap.__name__, optx.__version__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["wrap", optx.__version__], run.stderr


def test_a_type_checker_finds_it(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(USE)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(file)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    # It knows what wrap is: the only fault that it finds is the one that is there.
    assert "1 error" in run.stdout, run.stdout
    assert '"Wrapped"' in run.stdout


def test_a_wheel_has_all_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools leaves a build folder, and takes what an old one holds
    source.mkdir()
    for name in ("optx", "kernels", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "."]
    run = subprocess.run([*command, str(source)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("optx_torch-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("optx", "optx"), ("kernels", "optx/kernels"), ("recipes", "optx/recipes")):
        for file in (ROOT / folder).rglob("*.py"):
            if "kernels" not in file.relative_to(ROOT / folder).parts[:1]:
                assert str(target / file.relative_to(ROOT / folder)) in names
    assert not [name for name in names if not name.startswith(("optx/", "optx_torch-"))]


def test_wrapped_has_what_every_optimizer_has() -> None:
    """A method that a new torch brings is noticed here, and so is an argument."""
    for name, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        if name.startswith("_"):
            continue
        ours = getattr(optx.Wrapped, name)
        wanted, got = inspect.signature(method).parameters, inspect.signature(ours).parameters
        assert list(got)[: len(wanted)] == list(wanted), name
        for argument, parameter in wanted.items():
            assert got[argument].default == parameter.default, f"{name}({argument})"
            assert got[argument].kind == parameter.kind, f"{name}({argument})"


def test_what_wrapped_inherits_works_on_it() -> None:
    """Methods that it leaves to torch's class act on its own groups and hooks."""
    left = {
        name
        for name, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction)
        if not name.startswith("_") and getattr(optx.Wrapped, name) is method
    }
    hooks = {name for name in left if name.startswith("register_")}
    if left != hooks | {"profile_hook_step"}:
        pytest.fail(f"torch's {sorted(left - hooks)} run on Wrapped as they are; look whether they may")
