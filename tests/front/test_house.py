"""The house as its imports draw it: no arrow points up, none form a circle; and its tests, one law a file."""

from __future__ import annotations

import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with what its links lead to."""
    stage = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "optx", stage / "optx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", stage)  # with the contract
    return stage


def lint(house: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(house), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=300)


def test_no_import_points_up(house: Path) -> None:
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_that_points_up_is_found(house: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    shutil.copytree(house, bent)
    with (bent / "optx/kernels/cpu.py").open("a") as file:
        file.write("\n\ndef late():\n    from optx.step import plan\n    return plan\n")
    done = lint(bent)
    assert done.returncode == 1
    assert "optx.kernels is not allowed to import optx.step" in done.stdout


# ---- imports that the graph does not have -------------------------------------------------------------

BY_STRING = re.compile(r"\b(import_module|__import__|run_module|run_path|resolve_name|spec_from_\w+)\b")
BY_FOLDER = re.compile(r"^\s*(?:from|import(?:.*,)?)\s+(?:kernels|recipes)\b", re.MULTILINE)
MAY = {  # what these import is chosen by a name that a person typed, or is looked for
    "optx/_audit.py",
    "optx/_config_values.py",
    "optx/_doctor.py",
    "optx/cli.py",
    "optx/integrations/lightning.py",
    "kernels/available.py",
    "kernels/device_check.py",  # a command of kernels, which asks the front what programs there are
    "recipes/_bench_bases.py",
    "recipes/_pages.py",
}


def unseen(root: Path) -> list[str]:
    """Files that import by a string, and those that import a folder by its name outside of the package."""
    found: list[str] = []
    for folder in ("optx", "kernels", "recipes"):
        for file in sorted((root / folder).rglob("*.py")):  # which does not follow the package's links
            name, text = file.relative_to(root).as_posix(), file.read_text()
            if name not in MAY and (by_string := BY_STRING.search(text)):
                found.append(f"{name}: {by_string[0]}")
            found += [f"{name}: {by_folder.strip()}" for by_folder in BY_FOLDER.findall(text)]
    return found


def test_no_import_is_unseen() -> None:
    """By a string, or by the folder's own name, an arrow is not in the graph."""
    # What optx loads later stands as imports above, for type checkers; test_import_time.py compares.
    assert unseen(ROOT) == ["optx/__init__.py: resolve_name"]
    assert [name for name in MAY if not BY_STRING.search((ROOT / name).read_text())] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("optx/step/plan.py", 'hft = importlib.import_module("optx.transforms.hft")'),
        ("optx/inject/lora.py", "from importlib import import_module as load"),
        ("optx/ops.py", '    __import__("optx.step")'),
        ("kernels/step/program.py", "from kernels.audit import report"),
        ("recipes/merge.py", "    import recipes._run"),
        ("optx/cli.py", "import os, kernels as fast"),
    ],
)
def test_an_unseen_import_is_found(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"import os\n\n{line}\n")
    [found] = unseen(tmp_path)
    assert found.startswith(f"{file}: ")


# ---- circles, and the tests ---------------------------------------------------------------------------


def circle(house: Path, monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    monkeypatch.syspath_prepend(str(house))
    graph = grimp.build_graph("optx", cache_dir=None)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_no_imports_form_a_circle(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late ones and those for types count too."""
    assert circle(house, monkeypatch) is None


def test_no_file_of_tests_is_long() -> None:
    """One of several laws is read for all of them, run for all of them, and grows: it is split by law."""
    lines = {path: path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert len(lines) > 100
    assert [f"{path.relative_to(ROOT)}: {n}" for path, n in lines.items() if n > 500] == []


def named_tests() -> set[str]:
    """The files of tests that pages name as evidence, and that CI runs with the lowest versions."""
    pages = ("README.md", "CHANGELOG.md", "recipes/README.md", "tests/mutation/README.md")
    named = {name for page in pages for name in re.findall(r"tests/[\w/]+\.py", (ROOT / page).read_text())}
    [listed] = re.findall(r"^tests=\(.*?^\)$", (ROOT / ".ci/lowest").read_text(), re.DOTALL | re.MULTILINE)
    command = ["bash", "-c", f"{listed}\nprintf '%s\\n' \"${{tests[@]}}\""]  # braces expand as they do there
    return named | set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_tests_that_are_named_are_there() -> None:
    named = named_tests()
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
