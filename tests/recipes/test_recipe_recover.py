"""The recover recipe: its problems, and a run of seconds."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from optx.recipes import recover
from optx.recipes._recover_parts import ARMS, by_huber, drawn

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Namespace(size=6, rank=1, measurements=300, share=0.3, outlier=10.0)


@pytest.mark.parametrize(
    ("data", "share", "size"), [("clean", 0.0, 0.0), ("outliers", 0.3, 10.0), ("noise", 1, 0.5)]
)
def test_what_is_wrong_with_the_data(data: str, share: float, size: float) -> None:
    problem = drawn(data, 3, SMALL)
    assert torch.linalg.matrix_rank(problem.truth) == 1
    wrong = problem.y - problem.A.flatten(1) @ problem.truth.flatten()
    hit = wrong.abs() > 1e-9
    assert float(hit.double().mean()) == pytest.approx(share, abs=0.06)
    assert not hit.any() or float(wrong[hit].std()) == pytest.approx(size, rel=0.15)
    assert torch.equal(drawn(data, 3, SMALL).y, problem.y)


def test_huber_finds_clean_data() -> None:
    problem = drawn("clean", 0, SMALL)
    start = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert by_huber(problem, start, 50)[1] < 1e-6


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "40", "--size", "5", "--measurements", "60", "--every", "20", "--seeds", "2"]
    arms = ["subgm", "l2", "adam on l1", "huber (scipy)", "clean: polyak"]
    recover.main([*small, "--arms", ",".join(arms), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for seed in (0, 1) for arm in arms]
    for name, log in found["arms"].items():
        assert log["step"] == ([0, 40] if "huber" in name else [20, 40])
    assert set(arms) <= set(ARMS)
    assert (tmp_path / "recover.png").read_bytes().startswith(b"\x89PNG")
    assert "relative error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="draws its own data"):
        recover.main(["--data", "x"])
    with pytest.raises(SystemExit, match="--rank 9 is above --size 5"):
        recover.main(["--rank", "9", "--size", "5"])
