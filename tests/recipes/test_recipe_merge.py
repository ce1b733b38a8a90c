"""The merge recipe end to end: a tiny random BERT, and two tasks that a few words decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_models
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from optx.recipes import _digits, _experts, _reviews, merge
from optx.recipes._assets import AssetError, classifier

WORDS = ["warm", "cold", "film", "book", "a", "the", "very"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_models.encoder(tmp_path_factory.mktemp("encoder"), WORDS, layers=2, spread=0.3)


@pytest.fixture
def options(encoder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "tasks"
    data.mkdir()
    texts = [f"{a} {b} {c}" for a in ("a", "the", "very") for b in WORDS[:2] for c in WORDS[2:4]] * 6
    (data / "mood.tsv").write_text("".join(f"{'good' if 'warm' in t else 'bad'}\t{t}\n" for t in texts))
    (data / "topic.tsv").write_text("".join(f"{'book' if 'book' in t else 'film'}\t{t}\n" for t in texts))
    size = ["--steps", "12", "--seeds", "2", "--batch", "8", "--test", "12", "--valid", "8", "--masks", "2"]
    rates = ["--lr", "0.01", "--rates", "0.5", "0.99"]
    return ["--model", str(encoder), "--data", str(data), *size, *rates, "--out", str(tmp_path / "run")]


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "results.json").read_text())["arms"]


def test_prune_and_merge(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge.main([*options, "--parts", "prune,merge"])
    found = results(tmp_path)
    pruned = [f"prune/{trained}/{task}" for trained in merge.TRAINED for task in ("mood", "topic")]
    merged = [f"merge/{trained}" for trained in merge.TRAINED]
    assert sorted(found) == sorted(f"{key}/{seed}" for key in (*pruned, *merged) for seed in (0, 1))
    for key in pruned:
        one = found[f"{key}/0"]
        assert all(len(one[f"{method}/0.5"]) == (2 if "DARE" in method else 1) for method in merge.PRUNED)
        assert 1 - 0.5 <= one["q"]["0.5"] <= 1
        assert one["full"] > one["pretrained"] or one["full"] == 1
    for key in merged:
        one = found[f"{key}/0"]
        assert list(one) == ["pretrained", "experts", *merge.MERGED]
        assert all(set(part["accuracy"]) == {"mood", "topic"} for part in one.values())
    # AdamR's weights stay nearer to where they were.
    changes = [
        sum(found[f"{key}/{s}"]["change"] for key in pruned[i : i + 2] for s in (0, 1)) for i in (0, 2)
    ]
    assert changes[1] < changes[0]
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert (tmp_path / "run" / "merge.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*merge.PRUNED, *merge.MERGED))


@pytest.mark.long
def test_resume_keeps_finished_parts_and_trained_experts(options: list[str], tmp_path: Path) -> None:
    one = [*options, "--seeds", "1", "--steps", "2", "--masks", "1", "--rates", "0.5", "--parts", "prune"]
    merge.main(one)
    first = results(tmp_path)
    merge.main([*one, "--resume", "--parts", "prune,merge"])
    found = results(tmp_path)
    assert {key: found[key] for key in first} == first
    assert len(found) == len(first) + len(merge.TRAINED)


def test_data_must_be_a_folder_of_tasks(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "tasks" / "mood.tsv").unlink()
    with pytest.raises(AssetError, match=r"must be a folder with at least two files TASK\.tsv"):
        merge.main(options)


def test_an_expert_knows_its_encoder_from_its_head(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = classifier(str(encoder), 2)
    rows = [("a", "warm film"), ("b", "cold book")] * 8
    data = _reviews._tokenised(tokenizer, rows, 8)
    expert = _experts.Expert(model, tmp_path / "x.safetensors", data, data, data)
    inside, head = expert.encoder_and_head()
    assert [tuple(p.shape) for p in head] == [(2, 16), (2,)]
    assert len(inside) + len(head) == len(list(model.parameters()))
    with torch.no_grad():
        head[0] += 1
        inside[0] += 1
    expert.save()
    assert set(expert.delta) == set(expert.base)
    assert _experts.size(expert.delta) == pytest.approx(1, rel=1e-4)  # of what changed


def test_signatures_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured; that patches help is shown by test_rws.py."""
    monkeypatch.setattr(_digits, "CORRUPTED", {"contrast": _digits.CORRUPTED["contrast"]})
    found = _digits.measure(0, 1, merge.Run(tmp_path, {}, resume=False))
    assert found is not None
    assert len(found["contrast"]["curve"]) == 1 + _digits.LAYERS
    (clean, before), (_, after) = found["contrast"]["curve"][0], found["contrast"]["curve"][-1]
    assert clean > before
    assert after > before
    assert found["contrast"]["smaller"] == pytest.approx(8, rel=0.01)
