"""The sequences recipe end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optx.recipes import _sequences_parts, sequences


@pytest.mark.long
def test_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [sequences.ARMS[i] for i in (2, 3, 5, 6, 7)]
    small = ["--steps", "2", "--seeds", "1", "--length", "16", "--width", "8", "--state", "4"]
    sequences.main([*small, "--arms", ",".join(some), "--out", str(tmp_path)])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in some]
    for found in arms.values():
        assert all(list(found[task]["curve"]) == ["1", "2"] for task in ("digits", "lag"))
        assert all(found[task]["accuracy"] == found[task]["curve"]["2"] for task in ("digits", "lag"))
    assert arms["S4D-Real/0"]["lag"]["numbers"] < arms["S4D-Lin/0"]["lag"]["numbers"]  # nothing oscillates
    assert (tmp_path / "sequences.png").read_bytes().startswith(b"\x89PNG")
    assert "S4D-LegS at one rate" in capsys.readouterr().out


def test_the_signal_is_all_that_a_lag_has() -> None:
    data = _sequences_parts.lag(0, 40)
    (x, y), (again, _) = data.test[0], _sequences_parts.lag(0, 40).test[0]
    assert torch.equal(x, again)
    first = [x[y == one, :8] for one in range(8)]
    assert all(torch.equal(one, one[:1].expand_as(one)) for one in first)
    assert float(x[:, 8:].std()) == pytest.approx(0.1, rel=0.1)
    drawn, _ = data.batch(torch.Generator().manual_seed(5), 4)
    assert not any(torch.equal(drawn[0, 8:], one[8:]) for one in x)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "sequences brings its own model and data"),
        (["--state", "7"], "--state 7: S4D's modes come in pairs"),
        (["--length", "9"], "--length 9: the signal alone has 8 tokens"),
        (["--arms", "best"], "best is none of S4D-LegS"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        sequences.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
