"""The think recipe's parts "bandit" and "sums", small: what they tell, and an arm that is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from optx.recipes import _think_bandit, _think_report, _think_sums, think
from optx.recipes._run import Run, settings_of

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--warm-steps", "3", "--steps", "4", "--questions", "2", "--seeds", "1", "--bandit-steps", "12"]


def test_bandit_and_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(_think_sums, "HELD_OUT", 4)
    out = tmp_path / "out"
    think.main([*SMALL, "--parts", "bandit,sums", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == [f"{arm}/0" for arm in (*_think_bandit.ARMS, *_think_sums.ARMS)]
    assert results["arms"]["sum/0"]["probability"][-1] > 1 / 16
    assert [len(results["arms"][f"{arm}/0"]["rewards"]) for arm in _think_sums.ARMS] == [0, 0, 4, 4]
    assert (out / "think.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    for table in _think_report.tables(results):
        assert table.title in told
        assert all(len(row) == len(table.headers) for row in table.rows)
    with pytest.raises(SystemExit, match="--parts: tail is none of diversity, bandit, sums"):
        think.main(["--parts", "tail"])


def test_sums_are_worked_and_read() -> None:
    assert _think_sums.worked(47, 85) == "47+85=2131>132."
    ids = torch.tensor([[_think_sums.TOKENS.index(c) for c in "2131>132."]])

    class Made:
        tokens, mask, group = ids, torch.ones_like(ids, dtype=torch.bool), 1

    assert _think_sums.right(Made, ids).tolist() == [1.0]
    Made.tokens = ids.index_fill(1, torch.tensor([7]), 3)
    assert _think_sums.right(Made, ids).tolist() == [0.0]


@pytest.mark.parametrize("arm", _think_sums.ARMS[2:])
def test_an_interrupted_arm_goes_on_bit_for_bit(arm: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_think_sums, "HELD_OUT", 4)
    args = think.options().parse_args(SMALL)
    whole = _think_sums.train(
        arm, 0, _think_sums.prepared(args), args, Run(tmp_path / "whole", settings_of(args), False)
    )
    run = Run(tmp_path / "part", settings_of(args), False)
    judge, calls = _think_sums.right, [0]

    def stopping(*given: Any) -> Any:
        calls[0] += 1
        run.interrupt.wanted = calls[0] >= 2
        return judge(*given)

    monkeypatch.setattr(_think_sums, "right", stopping)
    assert _think_sums.train(arm, 0, _think_sums.prepared(args), args, run) is None
    monkeypatch.setattr(_think_sums, "right", judge)
    again = Run(tmp_path / "part", settings_of(args), True)
    assert _think_sums.train(arm, 0, _think_sums.prepared(args), args, again) == whole
    assert calls[0] == 2
