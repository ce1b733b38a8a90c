"""The lengths recipe end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optx.recipes import lengths

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 60


def test_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    size = ["--steps", "2", "--seeds", "1", "--length", "8", "--batch", "2", "--width", "8", "--layers", "1"]
    lengths.main([*size, "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")])
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in lengths.ATTENTION]
    entropies = {arm: found["8"]["entropy"] for arm, found in arms.items()}
    assert all(list(found) == ["1", "2", "4", "8"] for found in arms.values())
    assert entropies["LSSAR p=15/0"] < entropies["LSSAR p=3/0"] < entropies["LSSA/0"]
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "LSSAR p=15" in capsys.readouterr().out


def test_it_brings_its_own_model(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lengths trains its own model"):
        lengths.main(["--model", "x", "--out", str(tmp_path / "out")])
