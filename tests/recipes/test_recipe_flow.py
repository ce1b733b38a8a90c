"""The flow recipe end to end, small, on a genome of its own; its words, baselines and other methods."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optx.recipes import _flow_data, _flow_parts, flow


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    draws = torch.Generator().manual_seed(0)
    letters = [_flow_data.BASES[i] for i in torch.randint(4, (21_000,), generator=draws)]
    lines = ["".join(letters[i : i + 70]) for i in range(0, len(letters), 70)]
    file = tmp_path / "genome.fa"
    file.write_text(">made up\n" + "\n".join(lines).lower() + "\n")
    return file


@pytest.mark.long
def test_flow(tmp_path: Path, fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    small = [
        "--steps",
        "2",
        "--seeds",
        "1",
        "--length",
        "16",
        "--width",
        "8",
        "--samples",
        "4",
        "--euler",
        "7",
    ]
    flow.main([*small, "--data", str(fasta), "--out", str(out)])
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert list(arms) == ["baselines/0", *(f"{arm}/0" for arm in flow.ARMS)]
    assert [arm for arm in flow.ARMS if "tokens" in arms[f"{arm}/0"]] == list(flow.TOYS)
    assert [arm for arm in flow.ARMS if "guided" in arms[f"{arm}/0"]["dna"]] == list(flow.GUIDED)
    dna = arms[f"{flow.GUIDED[0]}/0"]["dna"]
    assert list(dna["guided"]) == [f"{gamma:g}" for gamma in flow.GAMMAS]
    assert dna["guided"]["0"]["gc"] == dna["gc"]  # no strength is no guide
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert "One token by vocabulary" in capsys.readouterr().out
    flow.main([*small, "--data", str(fasta), "--out", str(out), "--resume"])


def test_words_and_how_far_two_tables_of_them_are() -> None:
    found = _flow_data.kmers(torch.tensor([[0, 1, 2], [0, 1, 3]]), 2)
    assert found.sum() == 4
    assert found[0 + 4 * 1] == 2
    assert found[1 + 4 * 2] == found[1 + 4 * 3] == 1
    p, q = torch.tensor([30.0, 10.0]).double(), torch.tensor([19.5, 19.5]).double()
    assert _flow_data.divergence(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert _flow_data.diversity(torch.tensor([[0, 1], [0, 2]]).repeat(1, 2))["differ"] == 0.5
    assert _flow_data.gc(torch.tensor([[0, 1], [2, 3]])) == 0.5


def test_what_the_sequences_are(fasta: Path) -> None:
    bases = _flow_data.genome(str(fasta))
    assert len(bases) == 21_000
    data = _flow_data.dna(bases, 64)
    assert data.test.shape == (2 * 32, 64)  # of ten blocks
    motif = _flow_data.motifs()
    base = _flow_data.baselines({"motif": motif}, 0)["motif"]
    assert base["uniform"]["2-mers"] > 0.5
    assert base["independent bases"]["2-mers"] > 0.5
    assert base["training data"]["3-mers"] < 0.01


def test_other_methods_sample_what_their_model_says() -> None:
    def sure(x: Tensor, t: Tensor) -> Tensor:
        return 20 * torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(*x.shape[:2], 4)

    for method in (_flow_parts.LinearFlow(4), _flow_parts.MaskedDiffusion(4)):
        made = method.sample(sure, (3, 5), 10, torch.Generator().manual_seed(0))
        assert (made == 2).all()
        tokens = torch.full((3, 5), 2)
        assert method.loss(sure, tokens) < 1e-4
        assert method.loss(sure, tokens - 1) > 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "x"], "flow brings its own model"),
        (["--euler", "6"], "--euler 6: below 7 steps"),
        (["--arms", "best"], "best is none of baselines, Gumbel flow"),
        (["--data", "nowhere.fa"], "nowhere.fa is not a file"),
    ],
)
def test_what_makes_no_sense_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        flow.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_genome_that_is_too_short(tmp_path: Path) -> None:
    file = tmp_path / "short.fa"
    file.write_text(">x\nACGT\n")
    with pytest.raises(SystemExit, match="has 4 bases; at least 20480 are needed"):
        _flow_data.genome(str(file))
