"""The counterfactuals recipe end to end, small; its models, which are trained together as each alone."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from optx.recipes import _assets, _counterfactuals_parts, counterfactuals

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--steps", "30", "--seeds", "1", "--others", "2", "--factuals", "3", "--walk", "3", "--lr", "0.01"]


def test_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counterfactuals.main([*SMALL, "--out", str(tmp_path / "run")])
    arms = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in counterfactuals.ARMS]
    for arm in counterfactuals.ARMS:
        log = arms[f"{arm}/0"]
        assert log["taus"] == sorted({0.75, *counterfactuals.TAUS.get(arm, ())})
        at = log["at"][log["taus"].index(0.75)]
        assert all(
            at[name] == pytest.approx(sum(values) / 3, abs=1e-4) for name, values in log["each"].items()
        )
        assert all(0 <= at[kind] <= 1 for kind in ("new", "resampled", "probability", "reached"))
        assert min(log["accuracy"].values()) > 0.8
    close, near = (arms[f"{arm}/0"]["at"][0] for arm in ("closest", "nearest"))
    assert close["distance"] < near["distance"]
    assert near["lof"] < close["lof"]
    assert (tmp_path / "run" / "counterfactuals.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(capsys.readouterr().out.split())
    assert "What foretells validity" in shown
    assert "asked for as much probability as takes it to trex-i's distance" in shown


def test_one_of_all_models_is_as_trained_alone() -> None:
    x, y = _counterfactuals_parts.table(None)
    x = (x - x.mean(0)) / x.std(0)
    rows = torch.stack([torch.arange(50), torch.arange(100, 150)])
    run: Any = SimpleNamespace(steps=lambda name, start, stop: range(start, stop))
    run.interrupt = Namespace(wanted=False)
    args = Namespace(lr=0.01, steps=5)
    together = _counterfactuals_parts.trained(x, y, rows, 3, args, run)
    assert together is not None
    torch.manual_seed(3)
    for i, alone in enumerate([_counterfactuals_parts.network(30) for _ in rows]):
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.01)
        for _ in range(5):  # 50 rows are one batch, in whatever order
            optimizer.zero_grad()
            F.cross_entropy(alone(x[rows[i]]), y[rows[i]]).backward()
            optimizer.step()
        for name, weight in alone.named_parameters():
            torch.testing.assert_close(together[name][i], weight.detach(), atol=1e-4, rtol=1e-4)
        mine = _counterfactuals_parts.voted({n: w[i : i + 1] for n, w in together.items()}, x)[0]
        assert float((mine == alone(x).argmax(1)).double().mean()) > 0.99


def test_data_of_ones_own(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    lines = [f"{a:.3f},{b:.3f},{int(a + b > 1)}" for a, b in torch.rand(120, 2, generator=g).tolist()]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["a,b,good", *lines]))
    counterfactuals.main([*SMALL, "--data", str(file), "--arms", "closest", "--out", str(tmp_path / "run")])
    [log] = json.loads((tmp_path / "run" / "results.json").read_text())["arms"].values()
    assert 0 < log["at"][0]["distance"] < 1
    for text, words in (("a,b\n1,2\n", "must have features, and 0 and 1"), ("a,b\nx,1\n", "cannot be read")):
        file.write_text(text)
        with pytest.raises(_assets.AssetError, match=words):
            counterfactuals.main(["--data", str(file), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="--model has no meaning here"):
        counterfactuals.main(["--model", "x", "--out", str(tmp_path / "other")])
