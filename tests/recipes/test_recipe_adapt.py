"""The adapt recipe and `optx bench attach` end to end, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_models
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from injections import llama

from optx.recipes import _bench_attach, _reviews, adapt
from optx.recipes._assets import AssetError

GOOD, BAD = "a warm and funny film", "a cold and dull mess"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_models.encoder(tmp_path_factory.mktemp("encoder"), [*GOOD.split(), *BAD.split()])


@pytest.fixture
def options(encoder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "sentences.tsv"
    data.write_text(f"good\t{GOOD}\nbad\t{BAD}\n" * 20)
    size = ["--steps", "6", "--seeds", "2", "--batch", "8", "--length", "12", "--test", "8"]
    return ["--model", str(encoder), "--data", str(data), *size, "--out", str(tmp_path / "run")]


def test_adapt(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapt.main(options)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for arm in adapt.ARMS for seed in (0, 1)]
    trained = {arm: found["arms"][f"{arm}/0"]["trainable"] for arm in adapt.ARMS}
    head = 2 * 16 + 2
    assert trained["svfit"] == 2 * 16 + head  # one singular value per dimension, of query and value
    assert trained["lora"] == 2 * 8 * (16 + 16) + head
    assert max(trained, key=lambda arm: trained[arm]) == "full"
    sizes = {arm: found["arms"][f"{arm}/0"]["bytes"] for arm in adapt.ARMS}
    assert sizes["bitfit"] < sizes["full"]
    assert all(len(result["loss"]) == 6 and 0 <= result["accuracy"] <= 1 for result in found["arms"].values())
    assert found["step_ms"].keys() == adapt.ARMS.keys()
    assert (tmp_path / "run" / "adapt.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in adapt.ARMS)
    adapt.main([*options, "--resume"])  # everything is there already
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found


def test_sweep_tries_rates_on_other_sentences(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt.main([*options, "--arms", "lora", "--sweep", "1,3"])
    found = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert list(found) == ["lora/0.003/100", "lora/0.009/100"]
    assert "lora: 0.003:" in capsys.readouterr().out


def test_own_sentences_must_have_two_columns(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "sentences.tsv").write_text("no class\n")
    with pytest.raises(AssetError, match=r"has a line that is not class<TAB>sentence"):
        adapt.main(options)
    (tmp_path / "sentences.tsv").write_text("good\tx\n")
    with pytest.raises(AssetError, match=r"1 sentences of 1 classes; it takes more than --test \(8\)"):
        adapt.main(options)


def test_sentences_are_cut_and_batched() -> None:
    tokens = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 4, 0]])
    data = _reviews.Sentences(tokens, torch.tensor([0, 1, 0]), pad=0)
    rest, first = data.cut(1)
    assert (len(rest), len(first)) == (2, 1)
    batch = data.batch(torch.tensor([1, 0]))
    assert batch["input_ids"].tolist() == [[7, 0], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, when PEFT wraps the model
def test_bench_attach_counts_the_activations_of_both() -> None:
    base = llama().requires_grad_(False)
    ids = torch.randint(0, 64, (1, 16))
    frozen, peft, ours = _bench_attach.measure(base, ids, rank=2, rounds=1, dora=False)
    assert 0 < frozen.saved < ours.saved <= peft.saved
    assert all(len(subject.times) == 1 for subject in (frozen, peft, ours))
    assert _bench_attach.overheads([frozen, peft, ours], min)[:2] == [0, 1]
