"""Some hundred wrong files of every format are taken, or refused in a sentence; `run.py` reads more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import optx

RUN = Path(__file__).with_name("run.py")


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_wrong_files_of_every_format(tmp_path: Path, drawn_seed: int | None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    seed = 0 if drawn_seed is None else drawn_seed % 2**24
    command = [sys.executable, str(RUN), "--count", "30", "--seed", str(seed), "--keep", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stdout + told.stderr  # the seed and the number repeat a finding
    assert told.stdout.count(" refused, ") == 10


@pytest.mark.long
def test_what_is_no_refusal_is_a_finding(tmp_path: Path) -> None:
    """An error of another kind, a second, and a process that dies."""
    wrong = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import run
from formats import FORMATS, Format
calls, place = [], sys.argv[2]
def read(folder):
    calls.append(0)
    if len(calls) == 3:
        raise KeyError("x")
    if len(calls) == 5:
        while True:
            pass
    if len(calls) == 7:
        bytearray(1 << 40)
    if len(calls) == 9 and not os.path.exists(place + "/died"):
        open(place + "/died", "w").close()
        os.kill(os.getpid(), 11)
good = FORMATS["index"]
FORMATS["index"] = Format(good.make, good.mutate, read)
sys.argv[1:] = ["--format", "index", "--count", "10", "--keep", place]
sys.exit(run.main())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    command = [sys.executable, "-c", wrong, str(RUN.parent), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert told.returncode == 1, told.stderr
    assert "died with status 11" in told.stdout
    assert "FINDING" in told.stdout
    (tmp_path / "died").touch()
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    for finding in ("KeyError", "too slow", "MemoryError"):
        assert finding in told.stdout
