"""The explain recipe's parts, small: what they tell, and that glued halves compute what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from optx.recipes import (
    _explain_addition,
    _explain_digits,
    _explain_halves,
    _explain_report,
    _explain_svm,
    explain,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = _explain_halves.ARMS
SMALL = ["--seeds", "2", "--steps", "60", "--p", "7", "--width", "12", "--addition-steps", "40"]
SMALL += ["--half-steps", "40"]


def test_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(_explain_halves, "PAIRS", (200, 400))
    monkeypatch.setattr(
        _explain_halves, "ARMS", [arm.replace("1500", "200").replace("24000", "400") for arm in HALVES]
    )
    explain.main([*SMALL, "--parts", "digits,addition,halves", "--out", str(out)])
    results: Any = json.loads((out / "results.json").read_text())
    arms = results["arms"]
    every = (_explain_digits, _explain_addition, _explain_halves)
    assert list(arms) == [f"{arm}/{seed}" for part in every for seed in (0, 1) for arm in part.ARMS]
    said = capsys.readouterr().out
    for table in _explain_report.tables(results):
        assert table.title in said
        assert len({len(row) for row in table.rows} | {len(table.headers)}) == 1
    assert (out / "explain.png").read_bytes().startswith(b"\x89PNG")
    for arm in (*_explain_digits.CUTS, *_explain_addition.ARMS):
        for layer in ("first", "second"):
            one = arms[f"{arm}/0"][layer]
            assert len(one["curve"]) == one["dim"] + 1
            assert all(value >= arms[f"{arm}/0"]["full"] - 0.5 for value in one["curve"][one["needed"] :])
    assert arms["digits, interaction basis/0"]["second"]["dim"] <= 10
    free = arms[f"{_explain_digits.FREE}/0"]["4"]
    assert (free["weights"], free["rank_jacobian"]) == (490, 10)
    assert free["free"] == 490 - 10 * free["rank_gram"]
    # Two seeds are two networks, and the bases of one seed are of one network.
    assert arms["digits, interaction basis/0"]["first"] != arms["digits, interaction basis/1"]["first"]
    assert len({arms[f"{arm}/0"]["full"] for arm in _explain_digits.CUTS}) == 1
    few, more, *_ = (arms[f"{arm}/0"] for arm in _explain_halves.ARMS)
    assert few["Q"] != more["Q"]
    with pytest.raises(SystemExit, match="--parts: tail is none of digits"):
        explain.main(["--parts", "tail"])
    with pytest.raises(SystemExit, match="--model and --data have no meaning"):
        explain.main(["--model", "x", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_the_part_of_attention(tmp_path: Path) -> None:
    """W comes to the Frobenius norm's direction, K and Q to the nuclear norm's."""
    out = tmp_path / "out"
    explain.main(
        ["--parts", "svm", "--svm-steps", "250", "--svm-draws", "2", "--seeds", "1", "--out", str(out)]
    )
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in _explain_svm.ARMS]
    by_w, by_factors = arms.values()
    for one in (by_w, by_factors):
        assert [len(curve) for norm in ("fro", "nuc") for curve in one[norm]] == [13] * 4
        assert min(one["weight"]) > 0.9
    ends = {norm: [curve[-1] for curve in by_w[norm]] for norm in ("fro", "nuc")}
    assert min(ends["fro"]) > 0.95 > max(ends["nuc"])
    assert by_factors["fro rank"] > by_factors["nuc rank"]
    for fro, nuc in zip(by_factors["fro"], by_factors["nuc"], strict=True):
        assert nuc[-1] > fro[-1] + 0.02
    assert (out / "explain.png").read_bytes().startswith(b"\x89PNG")


def test_glued_halves_compute_what_they_did() -> None:
    torch.manual_seed(0)
    halves = [nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)) for _ in range(2)]
    model, rotations = _explain_halves.glue(*halves, torch.Generator().manual_seed(1))
    x = torch.randn(9, 64)
    both = torch.cat([halves[0](x[:, :32]), halves[1](x[:, 32:])], 1)
    torch.testing.assert_close(model(x), both @ rotations["5"].T, rtol=0, atol=1e-5)
    raw = torch.relu(torch.cat([halves[0][0](x[:, :32]), halves[1][0](x[:, 32:])], 1))
    torch.testing.assert_close(model[:4](x), raw @ rotations["3"].T, rtol=0, atol=1e-5)
    # A direction that reads the first half alone is of the first half, whatever the rotation.
    reads = torch.zeros(32, 1).double()
    reads[3] = 2
    share = _explain_halves.upper_share(rotations["3"], rotations["3"].double() @ reads)
    torch.testing.assert_close(share, torch.ones(1).double(), rtol=0, atol=1e-6)


def test_purity() -> None:
    shares = {"a": torch.tensor([0.9, 0.8, 0.1]), "b": torch.tensor([0.6, 0.2])}
    groups = {"a": torch.tensor([0, 0, 1]), "b": torch.tensor([1, 1])}
    assert _explain_halves.purity(shares, groups) == 80
    groups["b"][0] = -1  # has no edge, and counts nowhere
    assert _explain_halves.purity(shares, groups) == 100
