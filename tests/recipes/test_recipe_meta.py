"""The meta recipe end to end, small; and what its tasks are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optx.recipes import _assets, _meta_parts, meta

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--steps", "2", "--seeds", "1", "--tests", "2", "--inner-steps", "1"]


def seven(folder: Path) -> str:
    """Texts, each with words of its own."""
    for i in range(7):
        more = "and some more words" * 12
        lines = [f"HAMLET.\nline {n} of text {i} says word{i} {more}" for n in range(40)]
        (folder / f"{i}.txt").write_text("\n\n".join(lines))
    return str(folder)


def test_passages_leave_out_who_speaks_and_short_texts(tmp_path: Path) -> None:
    folder = seven(tmp_path)
    (tmp_path / "short.txt").write_text("too few lines")
    found = _meta_parts.passages(folder)
    assert list(found) == [str(i) for i in range(7)]
    assert all(len(one) == _meta_parts.EACH for one in found.values())
    assert all("HAMLET" not in text and "word3" in text for text in found["3"])
    (tmp_path / "fewer").mkdir()
    with pytest.raises(_assets.AssetError, match="has 0 files"):
        _meta_parts.passages(str(tmp_path / "fewer"))


def test_curves_are_the_tasks_of_the_paper_s_kind() -> None:
    domain = _meta_parts.curves(0)
    (support, query), again = domain.task(3), domain.task(3)
    assert (len(support.target), len(query.target)) == (10, 20)
    assert torch.equal(query.target, again[1].target)
    assert float(torch.cat([support.target, query.target]).abs().max()) <= 2
    x = torch.linspace(-5, 5, 50)[:, None]
    mean = torch.stack([domain.model()(x).detach()]).mean(0)
    assert float((mean - 2.5 / torch.pi * x.cos()).abs().mean()) < 0.1


@pytest.mark.long
def test_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    data = seven(tmp_path / "texts")
    meta.main([*SMALL, "--data", data, "--out", str(tmp_path / "run")])
    arms = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert list(arms) == [f"{arm}/0" for arm in meta.ARMS]
    assert arms["curves-abmll/0"]["width"] > arms["curves-point/0"]["width"]
    assert arms["curves-lora/0"]["width"] == 0
    assert all(0 <= arms[f"plays-{way}/0"]["ece"] <= 1 for way in meta.WAYS)
    assert (tmp_path / "run" / "meta.png").read_bytes().startswith(b"\x89PNG")
    assert "Which of two plays" in capsys.readouterr().out
