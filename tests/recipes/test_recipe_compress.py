"""The compress recipe end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from optx.recipes import compress

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 40


@pytest.mark.long
def test_compress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    small = ["--steps", "12", "--seeds", "1", "--tune", "2", "--kappa", "0", "60", "--length", "16"]
    out = tmp_path / "out"
    compress.main([*small, "--sequences", "2", "--data", str(tmp_path / "text.txt"), "--out", str(out)])
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == ["digits/0", "characters/0"]
    for found in arms.values():
        assert list(found) == ["0", "60"]
        plain, shrunk = (found[kappa]["trained"] for kappa in ("0", "60"))
        assert shrunk["bits"]["exp-golomb"] < plain["bits"]["exp-golomb"]
        assert shrunk["shape"] < plain["shape"]
        assert (plain["shapes"], len(shrunk["shapes"])) == ([], 12)
        for one in found.values():
            assert one["deepshape"].keys() == {"at once", "tuned"}
            assert one["rf8"]["score"] == pytest.approx(one["trained"]["score"], abs=0.1)
            assert one["trained"]["bits"]["entropy"] < one["trained"]["bits"]["exp-golomb"]
    assert (out / "compress.png").read_bytes().startswith(b"\x89PNG")
    assert "DeepShape and RF8 of the same models" in capsys.readouterr().out


def test_a_model_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="compress brings its own models"):
        compress.main(["--model", "x", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
