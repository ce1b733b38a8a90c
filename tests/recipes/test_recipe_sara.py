"""The sara recipe end to end, at a size that takes seconds, and what its arms train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from optx.recipes import _sara_parts, _sara_report, sara

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_sara_parts, "PRETRAINING", 20)
    monkeypatch.setattr(_sara_parts, "ZEROED", [0.0, 0.5])
    small = ["--steps", "4", "--every", "3", "--batch", "8", "--seeds", "2", "--lr", "0.01", "0.001"]
    sara.main([*small, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for seed in (0, 1) for arm in sara.ARMS]
    for key, log in found["arms"].items():
        assert list(log["rates"]) == ["0.01", "0.001"]
        for one in log["rates"].values():
            assert one["step"] == [0, 3, 4]
            assert len(one["new"]) == len(one["old"]) == 3
            assert bool(one["selected"]) == key.startswith(("sara", "blind"))
        first = log["rates"]["0.01"]
        if key.startswith("sara"):
            assert first["selected"][0] == pytest.approx(0.2, abs=1e-4)
            assert first["selected"][1] < 0.2
        if key.startswith("blind"):
            assert first["selected"][0] == first["selected"][1] == pytest.approx(0.2, abs=0.01)
    assert [len(curve) for curve in found["zeroed"]] == [2, 2]
    assert (tmp_path / "sara.png").read_bytes().startswith(b"\x89PNG")
    assert "smallest set to 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="brings its own"):
        sara.main(["--data", "x"])


def test_arms_have_as_many_numbers() -> None:
    args = sara.options().parse_args([])
    views = _sara_parts.load(0, args.angle)
    assert [len(views[f"{part} old"][1]) for part in ("learn", "choose", "test")] == [1000, 200, 597]
    counts: dict[str, int] = {}
    for arm in sara.ARMS:
        torch.manual_seed(0)
        model = _sara_parts.network()
        optimizer = sara.prepared(arm, model, 1e-3, args)
        every = [p for group in optimizer.param_groups for p in group["params"]]
        trained = sum(p.numel() for p in every)
        counts[arm] = optimizer.sara.density().selected if arm in ("sara", "blind") else trained  # type: ignore[attr-defined]
    assert counts["sara"] == round(0.2 * counts["adamw"])
    assert counts["blind"] == pytest.approx(counts["sara"], rel=0.03)
    assert counts["lora"] == pytest.approx(counts["sara"], rel=0.05)


def test_what_is_left_when_a_share_is_reached() -> None:
    log = {
        "rates": {
            "0.1": {"new": [0.1, 0.8, 0.9], "old": [0.9, 0.4, 0.3]},
            "0.01": {"new": [0.1, 0.2, 0.8], "old": [0.9, 0.8, 0.6]},
        }
    }
    assert _sara_report.left_when_reached(log, 0.8) == 0.6
    assert _sara_report.left_when_reached(log, 0.85) == 0.3
    assert _sara_report.left_when_reached(log, 0.95) is None
