"""The flatness recipe end to end, small, and its measures on functions whose sharpness is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pytorch_optimizer")

from optx.recipes import _flatness_parts, flatness

SMALL = ["--steps", "12", "--seeds", "1", "--width", "4", "--batch", "500", "--rounds", "3"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_flatness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flatness_parts, "ROUNDS", 2)
    monkeypatch.setattr(_flatness_parts, "MEASURED", 20)
    flatness.main([*SMALL, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    arms, step = found["arms"], found["step"]
    assert list(arms) == [f"{arm}/0" for arm in flatness.ARMS]
    assert step["sgd"] == 1.0
    assert arms["saf/0"]["bytes"] == 1000 * 3 * (10 * 2 + 4)
    weights = sum(
        p.numel() for p in _flatness_parts.network(4).state_dict().values() if p.is_floating_point()
    )
    assert arms["mesa/0"]["bytes"] == 4 * weights + 4 * 8  # and four counts of batches
    assert arms["sam of equal time/0"]["steps"] == round(12 / step["sam"])
    assert (tmp_path / "flatness.png").read_bytes().startswith(b"\x89PNG")
    assert "mesa of equal time" in capsys.readouterr().out


def test_the_largest_eigenvalue_of_a_known_matrix() -> None:
    w = nn.Parameter(torch.zeros(3))
    loss = 0.5 * (torch.tensor([1.0, -9.0, 4.0]) * w.square()).sum()
    gradient = torch.autograd.grad(loss, [w], create_graph=True)
    assert _flatness_parts.largest_eigenvalue(gradient, [w]) == pytest.approx(-9, rel=1e-3)


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    model, (x, y, _, _) = _flatness_parts.network(4), _flatness_parts.noisy_digits(0, 0.4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eigenvalue, rise = _flatness_parts.sharpness(model, x[:40], y[:40])
    assert eigenvalue > 0 < rise
    assert model.training
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=1e-6)


def test_the_share_of_wrong_labels() -> None:
    clean, noisy = (_flatness_parts.noisy_digits(1, wrong)[1] for wrong in (0.0, 0.4))
    assert float((clean != noisy).float().mean()) == pytest.approx(0.36, abs=0.03)  # a tenth is drawn right


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--model", "x"], "brings its own model and data"), (["--arms", "adam"], "adam is none of sgd")],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        flatness.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
