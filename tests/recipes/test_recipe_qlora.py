"""The qlora recipe end to end, on a tiny random Llama in 4 bits."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from recipe_models import causal

from optx.recipes import _four_bits, _qlora_report, qlora

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "the king is dead and the crown lies upon the ground while a cold wind blows from the sea "


@pytest.mark.filterwarnings("ignore:merge. .*quantised weights were rounded")
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, when PEFT wraps the model
def test_both_arms_are_alike_and_say_what_a_merge_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(arm: str, args: Namespace) -> dict[str, Any]:  # processes of their own: seconds each
        asked.append(arm)
        return {"base": 1e6, "before": 2e6, "peak": 5e6}

    monkeypatch.setattr(_four_bits, "measured", measured)
    model = causal(tmp_path / "model")
    (tmp_path / "data.txt").write_text(WORDS * 30)
    options = ["--model", str(model), "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "run")]
    size = ["--steps", "4", "--seeds", "2", "--batch", "2", "--length", "16", "--eval-blocks", "4"]
    options += [*size, "--lr", "0.05"]
    qlora.main(options)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    arms = found["arms"]
    assert list(arms) == ["optx/0", "peft/0", "optx/1", "peft/1"]
    assert arms["optx/0"]["loss"] != arms["optx/1"]["loss"]
    for seed in (0, 1):
        ours, theirs = arms[f"optx/{seed}"], arms[f"peft/{seed}"]
        assert len(ours["loss"]) == 4
        assert ours["loss"][-1] < ours["loss"][0]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["merge"] == pytest.approx(theirs["merge"], rel=1e-3)
        assert ours["held_out"] != ours["merged"]
        assert 0 < ours["merge"]["relative"] < ours["merge"]["of_change"]
        assert ours["trainable"] == theirs["trainable"]
    assert asked == ["float32", "optx", "peft"]
    assert (tmp_path / "run" / "qlora.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "Losses of one step differ by" in shown
    qlora.main([*options, "--resume"])  # everything is there already
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found
    assert len(asked) == 3


def test_memory_counts_codes_and_scales_of_the_base(tmp_path: Path) -> None:
    model, _ = _four_bits.load(str(causal(tmp_path)))
    weight: Any = model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit"
    assert weight.numel() == 64 * 128 // 2  # two codes to a byte
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    scales = _four_bits.base_bytes(model) - plain
    assert 0 < scales < plain
    assert type(model.lm_head) is torch.nn.Linear


def test_the_largest_difference_of_losses() -> None:
    one = [{"loss": [1.0, 2.0]}, {"loss": [3.0, 4.0]}]
    assert _qlora_report.apart(one, one) == 0
    assert _qlora_report.apart(one, [one[0], {"loss": [3.0, 3.5]}]) == 0.5
