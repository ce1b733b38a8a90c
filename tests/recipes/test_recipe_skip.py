"""The skip recipe end to end, small: filters and windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from optx.recipes import skip

ARMS = ["dense", "ftwt r=0.7", "windows pruned"]
SMALL = [
    *(
        "--steps",
        "12",
        "--seeds",
        "1",
        "--width",
        "2",
        "--batch",
        "500",
        "--rounds",
        "1",
        "--timed-width",
        "4",
    ),
    *("--size", "32", "--window-steps", "2", "--window-rounds", "1", "--arms", ",".join(ARMS)),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip.main([*SMALL, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/0" for arm in ARMS]
    assert found["arms"]["dense/0"]["kept"] == 1
    assert 0 <= found["arms"]["ftwt r=0.7/0"]["kept"] <= 1
    assert found["arms"]["ftwt r=0.7/0"]["start"] == found["arms"]["dense/0"]["start"]
    times = found["seconds"]
    assert 0.25 < times["0.5"]["kept"] < 0.5
    assert 0.06 < times["0.25"]["kept"] < times["0.5"]["kept"]
    assert (tmp_path / "skip.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "ResNet-18" in said
    assert "Swin2SR" in said


def test_what_makes_no_sense_is_said(tmp_path: Path) -> None:
    for given, says in ((["--data", "x"], "brings its own"), (["--arms", "ftwt"], "ftwt is none of dense")):
        with pytest.raises(SystemExit, match=says):
            skip.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
