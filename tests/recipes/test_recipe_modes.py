"""The modes recipe: its parts, a run of seconds, and a run that was killed."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("gymnasium")

from optx.policy import ActionMixture
from optx.recipes import _modes_control, _modes_parts, modes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    *("--steps", "20", "--env-steps", "220", "--random", "180"),
    *("--width", "8", "--batch", "8", "--keep", "1"),
]


def test_peaks_and_what_covers_them() -> None:
    assert torch.allclose(_modes_parts.reward(_modes_parts.PEAKS), torch.ones(4), atol=1e-3)
    assert float(_modes_parts.reward(torch.zeros(2))) < 1e-6
    means = _modes_parts.PEAKS[[0, 3, 3]].atanh().expand(500, 3, 2)
    mixture = ActionMixture(means, torch.full_like(means, -6), torch.tensor([0.0, 1.0, 1.0]).expand(500, 3))
    found = _modes_parts.covered(mixture)
    assert found["at"] == 2
    assert found["shares"][1:3] == [0.0, 0.0]
    assert found["shares"][0] + found["shares"][3] == pytest.approx(1)
    assert found["reward"] > 0.99


def test_a_run_and_one_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["peaks: freq", "control: SAC-PMOE"]
    here = [*SMALL, "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    modes.main([*here, "--arms", ",".join(arms)])
    found = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(found) == [f"{arm}/0" for arm in arms]
    assert len(found["control: SAC-PMOE/0"]["curve"]) == 20
    assert len(found["peaks: freq/0"]["curve"]) == 20
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")
    assert "peaks with a primitive" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("*"))
    modes.main([*here, "--arms", ",".join([*arms, "control: SAC"]), "--resume"])
    again = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert set(again) == {*found, "control: SAC/0"}
    assert all(again[key] == found[key] for key in found)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path) -> dict[str, Any]:
        args: Namespace = modes.options().parse_args([*SMALL, "--out", str(folder)])
        return modes.train("control: SAC-PMOE/3", args)

    whole = run(tmp_path / "whole")
    wanted, count = _modes_control.SAC.follow, 0

    def killed(agent: Any) -> None:
        nonlocal count
        count += 1
        if count > 30:  # of 39 steps; the first episode of 200 is kept
            raise KeyboardInterrupt
        wanted(agent)

    monkeypatch.setattr(_modes_control.SAC, "follow", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(_modes_control.SAC, "follow", wanted)
    [file] = (tmp_path / "killed" / "work").glob("*.pt")
    assert torch.load(file, weights_only=True)["step"] == 200
    assert run(tmp_path / "killed") == whole
    assert not file.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "modes brings its own policies and rewards"),
        (["--arms", "best"], "best is none of peaks: unimodal"),
        (["--env", "Nothing-v0"], "environment Nothing-v0: "),
        (["--env", "CartPole-v1"], "environment CartPole-v1: its actions or states are no rows of numbers"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        modes.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
