"""Heads that the base lacks, and vocabularies that have grown: taken whole from the tuned model, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import normal
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import optx
from optx import Delta, OptxError, ShapeError, cli

NEW = r".*(classifier|embed|lm_head).*"


def models(folder: Path) -> tuple[Path, Path]:
    """A base, and a model with a larger vocabulary, another head and one that is new."""
    base = {"embed.weight": normal(6, 4), "layer.weight": normal(4, 4), "classifier.weight": normal(2, 4)}
    tuned = {
        "embed.weight": normal(8, 4, seed=1),
        "layer.weight": base["layer.weight"] + 1,
        "classifier.weight": normal(3, 4, seed=2),
        "classifier.bias": normal(3, seed=3),
    }
    for name, state, words in (("base", base, 6), ("tuned", tuned, 8)):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"vocab_size": words}))
        (folder / name / "vocab.txt").write_text("word\n" * words)
    return folder / "base", folder / "tuned"


def test_they_are_named_with_a_way_out(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    with pytest.raises(
        ShapeError, match=r"'embed.weight' has shape \(8, 4\) .* exclude=, or resize one \(new tokens"
    ):
        Delta.between(base, tuned, exclude="classifier.*")
    with pytest.raises(
        OptxError, match=r"tuned has 'classifier.bias', which base lacks.* or take it as it is with whole="
    ):
        Delta.between(base, tuned, exclude=r".*\.weight")
    with pytest.raises(ShapeError, match=r"resize one \(new tokens: model.resize_token_embeddings\)"):
        optx.merge(base, [tuned], optx.TaskArithmetic(), tmp_path / "out", exclude="classifier.*")


@pytest.mark.parametrize("way", ["folder", "memory", "saved", "times"])
def test_they_are_taken_whole(way: str, tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    states: list[Any] = [load_file(path / "model.safetensors") for path in (base, tuned)]
    sources: list[Any] = states if way == "memory" else [base, tuned]
    delta = Delta.between(*sources, whole=NEW)
    assert delta.floating == ["layer.weight"]
    assert delta.whole == {"embed.weight", "classifier.weight", "classifier.bias"}
    pruned = delta.dare(0.5)
    if way == "saved":
        pruned = Delta.load(pruned.save(tmp_path / "d.safetensors"))
        assert pruned.whole == delta.whole
    scale = 0.5 if way == "times" else 1.0
    if way == "memory":
        made: Any = pruned.apply(states[0])
    elif way == "saved":  # the file has no configuration
        with pytest.warns(UserWarning, match="has tensors of the tuned model's shapes.*Put its own"):
            made = load_file(Path(str(pruned.apply(base, tmp_path / "out"))) / "model.safetensors")
    else:
        made = load_file(Path(str(pruned.apply(base, tmp_path / "out", scale=scale))) / "model.safetensors")
    assert made.keys() == states[1].keys()
    for name in delta.whole:
        assert torch.equal(made[name], states[1][name])
    assert not torch.equal(made["layer.weight"], states[1]["layer.weight"])
    config = tmp_path / "out" / "config.json"
    if way in ("folder", "times"):
        assert json.loads(config.read_text()) == {"vocab_size": 8}
        assert (tmp_path / "out" / "vocab.txt").read_text() == "word\n" * 8


def test_what_has_a_partner_is_a_change_all_the_same(tmp_path: Path) -> None:
    base, tuned = {"lm_head.weight": normal(3, 3)}, {"lm_head.weight": normal(3, 3, seed=1)}
    delta = Delta.between(base, tuned, whole=NEW)
    assert not delta.whole
    assert torch.equal(delta["lm_head.weight"], tuned["lm_head.weight"] - base["lm_head.weight"])


def test_arithmetic_and_compression_with_them(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    delta = Delta.between(base, tuned, whole=NEW)
    twice = delta + delta.subset("layer.*")
    assert torch.equal(twice["embed.weight"], delta["embed.weight"])
    assert torch.equal((delta * 3)["embed.weight"], delta["embed.weight"])
    assert torch.equal(delta.magnitude(0.5)["classifier.bias"], delta["classifier.bias"])
    with pytest.raises(
        OptxError, match=r"compress: 'classifier.bias', .* are taken whole from the tuned model"
    ):
        optx.compress(delta)
    assert optx.compress(delta.subset("layer.*")).numel == 16
    other = Delta.between({"embed.weight": normal(8, 4)}, {"embed.weight": normal(8, 4, seed=1)})
    with pytest.raises(
        OptxError, match=r"'embed.weight' is a change in one delta, and taken whole in the other"
    ):
        delta.unbound() + other.unbound()


def test_a_tuned_model_that_is_no_folder_leaves_the_base_configuration(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    delta = Delta.between(base, load_file(tuned / "model.safetensors"), whole=NEW)
    with pytest.warns(
        UserWarning, match="has tensors of the tuned model's shapes, and the base's configuration"
    ):
        delta.apply(base, tmp_path / "out")


@pytest.mark.parametrize("command", ["dare", "magnitude"])
def test_the_command_takes_what_it_excludes_whole(command: str, tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    arguments = ["delta", command, str(base), str(tuned), str(tmp_path / "out"), "--p", "0.5"]
    refused = CliRunner().invoke(cli.app, arguments)  # the heads are excluded by default, the embedding isn't
    assert refused.exit_code == 1
    assert "'embed.weight' has shape (8, 4) in tuned" in " ".join(refused.output.split())
    assert CliRunner().invoke(cli.app, [*arguments, "--exclude", NEW]).exit_code == 0
    made, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[n], wanted[n]) for n in made if n != "layer.weight")


def test_a_new_head_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    sizes = ("hidden_size", "intermediate_size", "vocab_size")
    options: dict[str, Any] = {**dict.fromkeys(sizes, 16), "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, labels in (("base", 2), ("tuned", 5)):
        torch.manual_seed(labels)
        BertForSequenceClassification(BertConfig(**options, num_labels=labels)).save_pretrained(
            tmp_path / name
        )
    delta = Delta.between(tmp_path / "base", tmp_path / "tuned", whole=".*classifier.*")
    delta.dare(0.5).apply(tmp_path / "base", tmp_path / "out")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.classifier.out_features == 5
