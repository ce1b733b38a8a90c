"""Runs the tests of `tests/interpreted`: Triton's interpreter has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parents[1] / "interpreted"


def test_interpreted_kernels(request: pytest.FixtureRequest) -> None:
    # One process: two would import everything twice.
    options = ["-n", "0", "-p", "no:cacheprovider", "-rN", "--tb=short"]
    chosen = {
        "--long": request.config.option.long,
        "--hypothesis-seed": request.config.option.hypothesis_seed,
    }
    options += [f"{name}={value}" for name, value in chosen.items() if value is not None]
    command = [sys.executable, "-m", "pytest", str(FOLDER), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, cwd=FOLDER.parents[1]
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
