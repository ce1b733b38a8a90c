"""`python -m optx.kernels.device_check`: without a GPU, when the time ends, when its process dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optx.kernels import device_check
from optx.kernels.device.checks import Check, Row


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_check.main([]) == 2
    assert "torch sees no GPU here. --interpret runs the same" in capsys.readouterr().out


@pytest.mark.long
def test_the_command_checks_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    code = device_check.main(["--interpret", "--only", r"entries|graph: AdamW$", "--json", str(file)])
    told = json.loads(file.read_text())
    assert code == 0
    assert [(row["what"], row["state"]) for row in told["rows"]] == [
        ("AdamW", "left out"),
        ("entries (CPU)", "ok"),
    ]
    assert told["about"]["interpreted"] is True
    shown = capsys.readouterr().out
    assert "1 ok, 0 wrong, 0 error, 1 left out" in shown
    assert "bits equal" in shown


CHILD = """
import json, os, sys, time
for name in json.loads(sys.stdin.readline()):
    kind, what = name.split(": ")
    if what == "dies":
        os._exit(7)
    if what == "breaks":
        print({mark!r} + json.dumps(dict(kind=kind, what=what, state="error", said="CUDA error")), flush=True)
        sys.exit(3)
    if what == "hangs":
        time.sleep(60)
    print("chatter")
    print({mark!r} + json.dumps(dict(kind=kind, what=what, state="ok")), flush=True)
"""


def rows(names: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """With a process that does by name what a bad kernel may do to it."""
    popen = device_check.subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", CHILD.format(mark=device_check._MARK)], **options)

    monkeypatch.setattr(device_check.subprocess, "Popen", other)
    made = device_check.Worker.row
    monkeypatch.setattr(device_check.Worker, "row", lambda self, wait: made(self, min(wait, 1.5)))
    checks = [Check("correct", name, lambda _: {}) for name in names]
    return list(device_check.rows(checks, True, seconds))


def test_what_breaks_its_process_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(["a", "dies", "b", "breaks", "c", "hangs", "d"], 60.0, monkeypatch)
    assert [(row.what, row.state) for row in found] == [
        *(("a", "ok"), ("dies", "error"), ("b", "ok"), ("breaks", "error"), ("c", "ok")),
        *(("hangs", "error"), ("d", "ok")),
    ]
    assert "the process ended with 7: chatter" in found[1].said
    assert found[3].said == "CUDA error"
    assert "no end after" in found[5].said


def test_when_the_time_is_over_what_is_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(["a", "hangs", "b", "c"], 1.0, monkeypatch)
    assert [row.what for row in found] == ["a", "hangs", "b", "c"]
    assert found[0].state == "ok"
    assert {row.state for row in found[2:]} == {"left out"}
    assert "the 1 s are over" in found[3].said


def test_the_exit_code_tells(tmp_path: Path) -> None:
    good, bad = Row("speed", "a", "ok"), Row("speed", "b", "wrong", said="3 apart")
    assert device_check.tell([good], tmp_path) == 0
    assert device_check.tell([good, bad], tmp_path) == 1
    assert device_check.tell([Row("speed", "c", "left out")], tmp_path) == 1
