"""The vocab recipe's part "head": a tiny model end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_models

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from optx.recipes import _vocab_head, vocab

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = recipe_models.causal(tmp_path / "model")
    data = recipe_models.texts(tmp_path)[:2]
    small = ["--length", "16", "--blocks", "40", "--eval-blocks", "4", "--batch", "32", "--rounds", "2"]
    out = tmp_path / "out"
    given = ["--model", str(model), *data, *small, "--steps", "20", "--lr", "1e-2", "--full-lr", "1e-2"]
    given += ["--seeds", "2"]
    vocab.main([*given, "--parts", "head", "--out", str(out)])
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/{seed}" for seed in (0, 1) for arm in _vocab_head.ARMS]
    full: Any = arms["full head/0"]
    assert (full["codes"], full["bytes"]) == (256, 256 * 64 * 4)
    assert full["tuned"] < full["post_hoc"]
    for key, one in arms.items():
        arm = key[:-2]
        if arm != "full head":
            assert one["codes"] == 256 // _vocab_head.ARMS[arm][0]
            assert one["bytes"] == 4 * (one["codes"] * 64 + 256)
            assert one["bias_bytes"] == one["bytes"] + 4 * 256
            assert one["bias_post_hoc"] < one["post_hoc"]
            assert one["bias_tuned"] < one["bias_post_hoc"]
            assert one["gap"] > 0
    assert arms["full head/0"] != arms["full head/1"]
    assert (out / "vocab.png").read_bytes().startswith(b"\x89PNG")
    [table] = _vocab_head.tables(json.loads((out / "results.json").read_text()))
    assert table.title in capsys.readouterr().out
    assert [row[0] for row in table.rows][:2] == ["full head", "V/12 codes (21)"]
    assert len(table.rows[0]) == len(table.headers)
    with pytest.raises(SystemExit, match="--parts: tail is none of head"):
        vocab.main(["--parts", "tail"])
