"""With --hypothesis-seed hypothesis draws other examples, alike in all workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parents[1]
DRAWING = """
import os
import pathlib
import pytest
from hypothesis import given, settings, strategies as st

@pytest.mark.parametrize("copy", range(4))
def test_drawn(copy):
    @settings(max_examples=5)
    @given(st.integers(0, 10**9))
    def draw(n):
        with pathlib.Path(f"drawn-{copy}").open("a") as file:
            file.write(f"{n}\\n")
    draw()

def test_fails(drawn_seed):
    @settings(max_examples=5)
    @given(st.integers(0, 10**9))
    def draw(n):
        assert n < 0
    draw()
"""


def drawn(folder: Path, *options: str) -> tuple[set[str], str]:
    """What the tests above drew, and what was printed."""
    folder.mkdir()
    for name in ("conftest.py", "processes.py", "whose_warnings.py"):
        shutil.copy(TESTS / name, folder)
    (folder / "test_it.py").write_text(DRAWING)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "4 passed" in run.stdout, run.stdout + run.stderr
    return {file.read_text() for file in folder.glob("drawn-*")}, run.stdout


@pytest.mark.long
def test_a_seed_draws_others_which_it_repeats(tmp_path: Path) -> None:
    fixed, _ = drawn(tmp_path / "fixed", "-n", "0")
    first, shown = drawn(tmp_path / "first", "-n", "1", "--hypothesis-seed=5")
    assert len(fixed) == len(first) == 1
    assert fixed != first
    assert "@reproduce_failure(" in shown
    again, _ = drawn(tmp_path / "again", "-n", "0", "--hypothesis-seed=5")
    assert again == first  # in a worker and out of one


def test_where_people_work_they_are_fixed(request: pytest.FixtureRequest, drawn_seed: int | None) -> None:
    """The state machine too, which has a process of its own."""
    drawn = request.config.option.hypothesis_seed is not None
    assert (drawn_seed is not None) == drawn

    @settings(max_examples=3)  # which keeps the other settings
    @given(st.integers())
    def test(_: int) -> None:
        pass

    chosen = test._hypothesis_internal_use_settings  # type: ignore[attr-defined]
    assert chosen.derandomize != drawn
