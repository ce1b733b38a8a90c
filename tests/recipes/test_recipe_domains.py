"""The domains recipe end to end, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from optx.recipes import _rotated, domains

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = domains._spurious.fit
    monkeypatch.setattr(domains._spurious, "fit", lambda arm, seed: fit(arm, seed, steps=5))
    small = ["--steps", "4", "--every", "2", "--batch", "4", "--seeds", "2", "--out", str(tmp_path)]
    domains.main(small)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for seed in (0, 1) for arm in domains.ARMS]
    for log in found["arms"].values():
        assert log["step"] == [2, 4]
        assert list(log["unseen"]) == ["0", "15", "30", "45", "60", "75"]
        assert all(len(curve) == 2 for curve in log["unseen"].values())
    assert {len(runs) for runs in found["spurious"].values()} == {5}
    assert set(found["step_ms"]) == set(domains.ARMS)
    assert (tmp_path / "domains.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "in equal time" in shown
    with pytest.raises(SystemExit, match="brings its own"):
        domains.main(["--data", "x"])


def test_the_arms_differ_in_their_penalties_alone() -> None:
    """At strength 0 all take the same steps, but for the order in which a mean is summed."""
    args = domains.options().parse_args(["--weight", "0", "--l2", "0", "--coral", "0", "--steps", "5"])
    batches = [(x[:4], y[:4]) for x, y in _rotated.load(0)[0][1:]]
    ends: list[nn.Module] = []
    for arm in domains.ARMS:
        torch.manual_seed(0)
        model = _rotated.network()
        optimizer = domains.prepared(arm, model, args)
        for _ in range(5):
            domains.step(arm, model, optimizer, batches, args)
        ends.append(model)
    for other in ends[1:]:
        for p, q in zip(ends[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def test_a_digit_is_turned_about_its_middle_and_in_one_domain() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3:5, 6] = 1.0  # right of the middle
    up = _rotated.turned(x, 90.0)[0, 0]
    assert float(up.sum()) == pytest.approx(2.0, abs=1e-4)
    assert {tuple(i) for i in (up > 0.9).nonzero().tolist()} in ({(1, 3), (1, 4)}, {(6, 3), (6, 4)})
    torch.testing.assert_close(_rotated.turned(x, 0.0), x)
    learn, kept = _rotated.load(0)
    assert sum(len(y) for _, y in learn + kept) == 1797


def test_coral_of_features_alike_is_0() -> None:
    f = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert float(_rotated.coral([f, f.flip(0), f])) == pytest.approx(0.0, abs=1e-6)
    shifted = _rotated.coral([f, f + 2.0])
    assert float(shifted) == pytest.approx(4.0, rel=1e-5)
