"""The prune recipe end to end: a tiny random Llama, and the digits in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_models
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import optx
from optx.recipes import _assets, _prune_digits, _prune_parts, _text, prune

WORDS = "the king is dead and the crown lies upon the ground while a cold wind blows from the sea " * 40
ARMS = [
    "magnitude 50% + norm",
    "magnitude 50% + all",
    "sparsegpt 2:4 + mask",
    "magnitude 50% + rebuilt",
    "dense + tuned",
    "digits",
]
RATES = {"norm": [1e-3, 1e-2], "mask": [1e-3], "rebuilt": [1e-3], "all": [1e-4], "tuned": [1e-4]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_prune_digits, "STEPS", {"dense": 40, "retrained": 20})
    monkeypatch.setattr(_prune_digits, "SHARES", (0.9,))
    monkeypatch.setattr(prune, "RATES", RATES)
    model = tmp_path / "model"
    model.mkdir()
    recipe_models.causal(model)
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    small = ["--steps", "2", "--seeds", "1", "--length", "32", "--eval-blocks", "3", "--calibration", "4"]
    paths = ["--model", str(model), "--data", str(text), "--general", str(text)]
    return [*paths, *small, "--workers", "1", "--arms", ",".join(ARMS), "--out", str(tmp_path / "run")]


@pytest.mark.long
def test_prune(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune.main(options)
    run = tmp_path / "run"
    found = json.loads((run / "results.json").read_text())
    arms, pruned = found["arms"], found["pruned"]
    assert sorted(arms) == sorted(f"{arm}/0" for arm in ARMS)
    assert sorted(pruned) == sorted(["dense", *prune.METHODS])
    assert pruned["sparsegpt 2:4"]["pattern"] == "2:4"
    for name, one in arms.items():
        if name not in ("dense + tuned/0", "digits/0"):
            assert one["sparsity"] == 0.5
    assert arms["sparsegpt 2:4 + mask/0"]["as_loaded"] == {"sparsity": 0.5, "apart": 0.0}
    numbers, zeros = pruned["dense"]["parameters"], pruned["magnitude 50%"]["served"] // 2
    assert (
        arms["magnitude 50% + all/0"]["trained"]
        == numbers - zeros
        == arms["dense + tuned/0"]["trained"] - zeros
    )
    assert arms["magnitude 50% + norm/0"]["trained"] == 64 * 3
    assert sorted(found["rates"]) == sorted(f"{k}/{lr:g}" for k in RATES for lr in RATES[k])
    digits = arms["digits/0"]["0.9"]
    assert digits["trained"] == {
        "biases": 1034,
        "+ norms": 1546,
        "+ MaskLoRA": 8202,
        "all": 86026 - 14745 - 58982,
    }
    assert (run / "prune.png").read_bytes().startswith(b"\x89PNG")
    assert "norms, MaskLoRA" in capsys.readouterr().out

    # What it leaves is a model for anyone, and its masks; a second call finds all done.
    folder = run / "pruned" / "sparsegpt-2of4"
    optx.Masks.load(folder / _prune_parts.MASKS).verify(_assets.language_model(str(folder))[0])
    before = (run / "results.json").read_bytes()
    prune.main([*options, "--resume"])
    assert (run / "results.json").read_bytes() == before


def test_texts_share_no_block(options: list[str]) -> None:
    args, data = _prune_parts.texts(prune.options().parse_args(options))
    train, taken = data.text.train, torch.cat([data.valid, *data.calibration])
    assert len(data.valid) == 3
    assert len(taken) == 7
    assert len(train) + len(taken) == len(_text.load(_assets.language_model(args.model)[1], args).train)


def test_an_arm_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"wanda \+ norm is none of magnitude 50% \+ norm"):
        prune.main(["--arms", "wanda + norm", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
