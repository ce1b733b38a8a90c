"""The share recipe and its benchmark end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optx.recipes import _bench_share, share


@pytest.mark.long
def test_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share.main(["--steps", "2", "--seeds", "1", "--size", "100", "--out", str(tmp_path)])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in share.ARMS]
    found = {arm: arms[f"{arm}/0"]["accuracy"] for arm in share.ARMS}
    assert all(list(found[arm]) == ["1.0", "0.1", "0.02"] for arm in share.SHARED)
    assert all(len(sizes) == len(share.SIZES) for arm in share.SHARED for sizes in found[arm].values())
    assert list(found["dense"]) == ["1.0"]
    assert list(found["pruned at the start"]) == ["0.1", "0.02"]
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")
    assert "STABLE-RPS" in capsys.readouterr().out


def test_all_have_as_many_numbers() -> None:
    hidden = 64 * 128 + 128 * 128
    for c in share.COMPRESSIONS:
        small, _ = share.other("smaller dense", c, 0.1)
        assert sum(small[int(i)].weight.numel() for i in share.HIDDEN) == pytest.approx(c * hidden, rel=0.05)  # type: ignore[arg-type, union-attr]
        _, opt = share.shared("STABLE-RPS", c, 0.1, 0, 0.1)
        assert opt.grad_scale.psi.numel() == int(c * hidden)
    pruned, _ = share.other("pruned at the start", 0.1, 0.1)
    kept = sum(int((pruned[int(i)].weight != 0).sum()) for i in share.HIDDEN)  # type: ignore[arg-type, union-attr]
    assert kept == pytest.approx(0.1 * hidden, rel=0.01)


def test_training_memory_at_a_tenth_is_below_a_fifth() -> None:
    for case in _bench_share.CASES:
        for adam in (False, True):
            found = _bench_share.memory(case, 0.1, adam)
            assert found["floor"] <= found["shared"] <= 0.2 * found["dense"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "share brings its own model and data"),
        (["--size", "1797"], "--size 1797: of 1797 digits none is left"),
        (["--arms", "best"], "best is none of STABLE-RPS"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        share.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
