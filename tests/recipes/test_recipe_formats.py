"""The formats recipe end to end, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_models

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from optx.recipes import _formats_report, formats

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    llama = recipe_models.llama(tmp_path_factory.mktemp("llama"))
    data = recipe_models.texts(tmp_path_factory.mktemp("texts"))[:2]
    size = ["--width", "32", "--layers", "1", "--batch", "2", "--length", "16", "--tuning-length", "16"]
    return ["--model", str(llama), *data, *size, "--steps", "3", "--tuning-steps", "2", "--eval-blocks", "2"]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_formats(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.main([*small, "--seeds", "2", "--out", str(tmp_path)])
    arms = results(tmp_path)["arms"]
    assert list(arms) == [f"{arm}/{seed}" for seed in (0, 1) for arm in formats.ARMS]
    # Weight, gradient, two moments; scales of 32 numbers and counts are what goes beyond whole bytes.
    for kept, least in {"float32": 16, "bfloat16": 12, "8bit": 10.125, "8bit+split": 7.125}.items():
        assert least <= arms[f"characters/{kept}/0"]["resident_bytes"] < least + 0.3
    # One seed's arms begin alike and see the same text; what is kept in fewer bits shows afterwards.
    usual, coded = (arms[f"characters/{kept}/0"] for kept in ("float32", "8bit"))
    assert usual["loss"][0] == coded["loss"][0] != arms["characters/float32/1"]["loss"][0]
    assert usual["held_out"] != coded["held_out"]
    assert usual["held_out"] == pytest.approx(coded["held_out"], abs=0.01)
    shown = " ".join(capsys.readouterr().out.split())
    assert "characters from scratch: 1 layers of width 32, 3 steps" in shown
    assert "a language model tuned: 2 steps of 16 tokens" in shown
    assert (tmp_path / "formats.png").read_bytes().startswith(b"\x89PNG")

    first = arms["tuning/float32/0"]
    formats.main([*small, "--seeds", "1", "--arms", "tuning/float32", "--out", str(tmp_path), "--resume"])
    assert results(tmp_path)["arms"]["tuning/float32/0"] == first


def test_differences_stand_beside_the_seeds() -> None:
    def arm(*ends: float) -> list[Any]:
        return [{"held_out": end, "resident_bytes": 16.0} for end in ends]

    settings = {"layers": 2, "width": 8, "steps": 5}
    found = {"float32": arm(1.0, 1.5, 1.25), "8bit": arm(1.1, 1.45, 1.25)}
    runs = {f"characters/{kept}/{i}": one for kept, seeds in found.items() for i, one in enumerate(seeds)}
    [table] = _formats_report.tables({"arms": runs, "settings": settings})
    assert table.rows[1][2] == "+0.0167 (-0.0500 to +0.1000)"
    assert "seeds lie 0.5000 apart" in table.note
    assert "8bit 0.20" in table.note  # 0.1 of 0.5: the greatest, not the mean


def test_a_quick_run_is_short() -> None:
    assert formats.options(quick=True).parse_args([]).steps < formats.options().parse_args([]).steps / 10


def test_a_width_that_no_heads_fit(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--width 30: the transformer has 4 heads; give a multiple of 4\."):
        formats.main(["--width", "30", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
