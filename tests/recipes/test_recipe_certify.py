"""The certify recipe's parts, small: what they tell, and what is certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from optx.recipes import _certify_depth, _certify_digits, _certify_report, certify

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    parts = "digits"
    small = ["--seeds", "1", "--steps", "40"]
    try:
        import cvxpy  # noqa: F401

        parts = "digits,depth"
        small += ["--depths", "2", "--width", "6", "--depth-epochs", "1"]
    except ImportError:
        pass
    out = tmp_path / "out"
    certify.main([*small, "--parts", parts, "--out", str(out)])
    results: Any = json.loads((out / "results.json").read_text())
    arms = results["arms"]
    assert list(arms)[:4] == [f"{arm}/0" for arm in _certify_digits.ARMS]
    for arm in _certify_digits.ARMS:
        curve = arms[f"{arm}/0"]["certified"]
        assert curve == sorted(curve, reverse=True)
        assert curve[0] > 0.3
    said = capsys.readouterr().out
    for table in _certify_report.tables(results):
        assert table.title in said
        assert len({len(row) for row in table.rows} | {len(table.headers)}) == 1
    assert (out / "certify.png").read_bytes().startswith(b"\x89PNG")
    for arm in _certify_depth.ARMS if "depth" in parts else ():
        one = arms[f"{arm}/0"]
        for lower, bound, product in zip(one["lower"], one["bound"], one["product"], strict=True):
            assert lower <= bound * (1 + 1e-6) <= product * (1 + 2e-6)
    with pytest.raises(SystemExit, match="have no meaning here"):
        certify.main(["--model", "x"])


@pytest.mark.parametrize("arm", _certify_digits.ARMS)
def test_every_arm_keeps_its_constant(arm: str) -> None:
    torch.manual_seed(0)
    model, handles = _certify_digits.network(arm, 3.0)
    told = _certify_digits.constant(model.eval(), handles)
    assert told == pytest.approx(3.0, rel=0.5 if arm == "spectral norm" else 1e-4)  # its estimate is rough
    x, y = torch.rand(2, 500, 64)
    with torch.no_grad():
        ratio = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert 0.0 < float(ratio.max()) <= told * (1 + 1e-5)
