"""The reweight recipe: its text, its figures by hand, and a run of seconds."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from optx.recipes import _reweight_report, reweight
from optx.recipes._reweight_parts import Characters, Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the king is dead and the crown lies upon the ground while a cold wind blows from the sea. " * 60


def args(**given: Any) -> Namespace:
    return Namespace(**({"length": 8, "noisy": 0.2, "duplicated": 0.3, "passages": 3} | given))


def test_kinds_of_text() -> None:
    data = Characters(TEXT, args(length=30))
    x, y, kinds = data.mixed(4, 4000, seed=1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again = data.mixed(4, 4000, seed=1)
    assert all(torch.equal(a, b) for a, b in zip((x, y, kinds), again, strict=True))
    assert not torch.equal(x, data.mixed(5, 4000, seed=1)[0])
    shares = [float((kinds == kind).float().mean()) for kind in range(3)]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    letters = sorted(set(TEXT))
    texts = ["".join(letters[code] for code in row) for row in x.tolist()]
    assert all((text in TEXT) == (kind != 1) for text, kind in zip(texts, kinds.tolist(), strict=True))
    assert len({text for text, kind in zip(texts, kinds.tolist(), strict=True) if kind == 2}) == 3
    held_out = torch.cat([block for block, _ in data.held_out()])
    assert all(
        "".join(letters[code] for code in row) in TEXT[len(TEXT) * 9 // 10 :] for row in held_out.tolist()
    )


def test_the_model_sees_no_later_character() -> None:
    torch.manual_seed(0)
    model = Transformer(9, 6, 8, 2)
    tokens = torch.randint(9, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 9
    a, b = model(tokens), model(changed)
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-6)
    assert not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-3)


@pytest.mark.parametrize(("cost", "loss"), [(1.0, 2.0), (0.9, 2.0), (1.25, 2.5), (2.0, 3.25), (20.0, 4.0)])
def test_a_loss_at_equal_time(cost: float, loss: float) -> None:
    log = {"step": [10, 20, 40], "held_out": [4.0, 3.25, 2.0], "cost": cost}
    assert _reweight_report.at_time(log) == pytest.approx(loss)


@pytest.mark.long
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    small = ["--steps", "20", "--length", "16", "--width", "8", "--every", "10", "--seeds", "2"]
    reweight.main([*small, "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for seed in (0, 1) for arm in reweight.ARMS]
    for name, log in found["arms"].items():
        assert log["step"] == [10, 20]
        assert log["held_out"][1] < log["held_out"][0]
        plain = name.startswith("adamw")
        assert all((w == pytest.approx(1)) == plain for one in log["weights"].values() for w in one[1:])
        assert (log["cost"] == 1.0) == plain
    assert (tmp_path / "run" / "reweight.png").read_bytes().startswith(b"\x89PNG")
    assert "weight, duplicated" in capsys.readouterr().out


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--width 10: the model has 4 heads"):
        reweight.main(["--width", "10", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--model has no meaning here"):
        reweight.main(["--model", "x", "--out", str(tmp_path / "out")])
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(SystemExit, match="--length 64: the text has only 9 characters"):
        reweight.main(["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")])
