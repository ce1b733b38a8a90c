"""The selftune recipe end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optx.recipes import selftune

SMALL = ["--steps", "60", "--seeds", "1", "--size", "100"]


@pytest.mark.long
def test_selftune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selftune.main([*SMALL, "--out", str(tmp_path)])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in selftune.ARMS]
    history = arms["stn/0"]["history"]
    assert history["drop"][0] == pytest.approx(0.05)
    assert arms["stn from above/0"]["history"]["noise"][0] == pytest.approx(0.8)
    assert history["batches"][-1] == 60
    assert len(history["batches"]) == 6  # from 50 on one for every second step
    equal, whole = (arms[f"grid of {kind}/0"] for kind in ("equal steps", "whole runs"))
    assert (equal["steps"], whole["steps"]) == (60 // len(selftune.GRID), 60)
    assert len(whole["grid"]) == len(selftune.GRID)
    assert whole["valid"] == min(whole["grid"])
    assert arms["grid of equal time/0"]["seconds"] >= arms["stn/0"]["seconds"]
    assert (tmp_path / "selftune.png").read_bytes().startswith(b"\x89PNG")
    assert "stn from above" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "selftune brings its own model and data"),
        (["--size", "599"], "--size 599: of 1797 digits none would be left to test on"),
        (["--arms", "grid of equal time"], "takes the time of 'stn', so it needs that arm too"),
        (["--arms", "best"], "best is none of stn"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        selftune.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
