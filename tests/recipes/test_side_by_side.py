"""Processes for many small trainings: results and failures arrive, and none is left behind."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from optx.recipes._side_by_side import Processes, cores


@pytest.mark.parametrize("count", [1, 2])
def test_results_and_failures_arrive(count: int) -> None:
    with Processes(count, tuple, [10]) as processes:  # all get a 10 besides
        found = dict(processes.each(operator.truediv, [(5,), (20,), (1,)]))
        assert found == {0: 0.5, 1: 2.0, 2: 0.1}
        with pytest.raises(TypeError):
            list(processes.each(operator.truediv, [("x",)]))
        if count > 1:
            list(processes.each(operator.mod, [("%d",)]))
            pids = set(dict(processes.each(_whose, [()] * 4)).values())
            assert os.getpid() not in pids
            # Ctrl-C reaches all processes of a terminal; the first one alone says what it means.
            assert dict(processes.each(_interrupted, [()])) == {0: "went on"}
    if count > 1:
        assert not any(map(_alive, pids))


def _whose(_: int) -> int:
    return os.getpid()


def _interrupted(_: int) -> str:
    signal.raise_signal(signal.SIGINT)
    return "went on"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


SCRIPT = """
import os, signal, sys
from optx.recipes._side_by_side import Processes

if __name__ == "__main__":
    with Processes(2, tuple, []) as processes:
        list(processes.each(os.getpid, [()]))  # each process ends by itself; one shows it
        with open(sys.argv[1], "w") as file:
            print(*processes._pool._processes, file=file)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_they_end_with_who_made_them(tmp_path: Path) -> None:
    script, told = tmp_path / "killed.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    ended = subprocess.run([sys.executable, script, told], check=False, stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in told.read_text().split()]
    assert pids
    until = time.monotonic() + 20
    while any(map(_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in pids if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_there_is_room_for_one() -> None:
    assert cores() >= 1
