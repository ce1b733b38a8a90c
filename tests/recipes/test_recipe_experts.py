"""The experts recipe end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optx.recipes import experts

SMALL = ["--steps", "8", "--seeds", "1", "--size", "100"]


@pytest.mark.long
def test_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts.main([*SMALL, "--out", str(tmp_path)])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in experts.ARMS]
    kept = {arm: one["kept"] for arm, one in arms.items()}
    assert kept["dense/0"] == kept["ewa/0"] == kept["tuned ewa/0"] == 35_242
    assert kept["widenet/0"] == 22_698
    assert arms["ewa/0"]["work"] == arms["dense/0"]["work"]
    assert arms["widenet/0"]["work"] == arms["wide/0"]["work"] + 4 * 4 * 32  # and its router
    together, apart = (arms[f"{arm}/0"]["spread"][-1][1] for arm in ("ewa", "apart"))
    assert together < apart / 5
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "tuned apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "experts brings its own model and data"),
        (["--arms", "dense,best"], "best is none of dense"),
        (["--beta", "0.9"], r"beta is 0.9; with 4 experts it must be at most 0.75"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        experts.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
