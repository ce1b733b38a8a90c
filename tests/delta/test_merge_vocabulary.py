"""Models of several vocabularies merged: equal tokens in equal rows, as mergekit 0.1.5 puts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_yaml_cases import causal, differences, ours, tensors, theirs
from torch import Tensor

import optx
from optx.delta._mergekit import read_config

yaml: Any = pytest.importorskip("yaml")
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def model(
    place: Path, name: str, words: str, seed: int, special: str = "", rows: int = 0, tied: bool = False
) -> None:
    """A Llama with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    made: Any = causal(
        "Llama",
        seed,
        num_hidden_layers=2,
        vocab_size=rows or len(tokenizer),
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    made.save_pretrained(place / name)
    tokenizer.save_pretrained(place / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("vocabularies")
    model(found, "v1", "abcdef", 0)
    model(found, "v2", "abcxyz", 1, "<|im|>")
    model(found, "v3", "fedcba", 2, "<pad>", rows=16)  # more rows than tokens
    model(found, "v4", "abcdef", 3, "<q>")
    model(found, "short", "abcdef", 4, rows=8)  # fewer
    model(found, "tied", "abcdef", 5, tied=True)
    model(found, "other tied", "abcdefg", 6, "<|im|>", tied=True)
    return found


def by_token(folder: Path) -> dict[str, Tensor]:
    """Its tensors, rows in the order of the words: mergekit numbers new tokens anew in each run."""
    from transformers import AutoTokenizer

    made = tensors(folder)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    order = [vocabulary[word] for word in sorted(vocabulary)]
    for name in set(ROWS) & set(made):
        rest = torch.arange(len(order), len(made[name])).tolist()
        made[name] = made[name][order + rest]
    return made


TASK = (
    "merge_method: task_arithmetic, base_model: v1, models: [{model: v4}, {model: v2}], "
    "parameters: {weight: 0.5}"
)
TOKENS = (
    "{'<|im|>': {source: {kind: model_token, model: v1, token: a}, force: true}, x: {source: {kind: zero}}, "
    "y: {source: {kind: model_token, model: v2, token_id: 4}}, '</s>': {source: v2, force: true}}"
)
LINEAR = (
    "merge_method: linear, base_model: v1, models: [{model: v1}, {model: v2}], parameters: {weight: [1, 2]}"
)
CASES = {
    "base": f"{{{LINEAR}, tokenizer_source: base}}",
    "union": f"{{{LINEAR}, tokenizer_source: union}}",
    "union of three": f"{{{TASK}, tokenizer_source: union}}",
    "another": f"{{{LINEAR.replace('base_model: v1', 'base_model: v2')}, tokenizer_source: v1}}",
    "padded rows": "{merge_method: slerp, base_model: v1, models: [{model: v3}], parameters: {t: 0.3}, "
    "tokenizer_source: v3}",
    "rows too few": "{merge_method: linear, base_model: short, models: [{model: short}], parameters: "
    "{weight: 1}, tokenizer_source: base}",
    "tied": "{merge_method: ties, base_model: tied, models: [{model: other tied}], parameters: "
    "{weight: 0.5, density: 0.5}, tokenizer: {}}",
    "tokens": f"{{{LINEAR}, tokenizer: {{source: union, tokens: {TOKENS}}}}}",
    "a new token": f"{{{LINEAR}, tokenizer: {{source: v2, tokens: {{'<n>': {{source: {{kind: zero}}}}}}}}}}",
}


@pytest.mark.parametrize("case", CASES)
def test_as_mergekit(case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    ours(CASES[case], tmp_path / "ours")
    theirs(CASES[case], tmp_path / "theirs")
    mine, other = by_token(tmp_path / "ours"), by_token(tmp_path / "theirs")
    assert set(mine) == set(other)
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())
    sizes = [
        json.loads((tmp_path / who / "config.json").read_text())["vocab_size"] for who in ("ours", "theirs")
    ]
    assert sizes == [len(mine[ROWS[0]])] * 2


def test_padding(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a multiple, with the mean of the rows."""
    monkeypatch.chdir(place)
    text = f"{{{LINEAR}, tokenizer: {{source: base, pad_to_multiple_of: 8}}}}"
    made, wrong = differences(text, tmp_path)
    assert not wrong
    rows = made[ROWS[0]]
    assert len(rows) == 16
    torch.testing.assert_close(rows[9:], rows[:9].mean(0).expand(7, -1))


def test_the_same_file_gives_the_same_numbers_each_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tokens are numbered in the order of the file and of their numbers there."""
    monkeypatch.chdir(place)
    ours(CASES["union of three"], tmp_path / "out")
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__)[9:] == ["x", "y", "z", "<q>", "<|im|>"]


def test_a_token_that_another_model_has_no_row_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as one that the model lacks; mergekit ends in a KeyError."""
    monkeypatch.chdir(place)
    made = ours(f"{{{LINEAR.replace('v2', 'short')}, tokenizer_source: base}}", tmp_path / "out")
    own = tensors(place / "v1")
    for name in ROWS:
        torch.testing.assert_close(made[name][8], own[name][8])
        assert not torch.equal(made[name][7], own[name][7])


def test_special_tokens_keep_their_meaning(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another vocabulary they have other numbers; config.json names them by number."""
    model(tmp_path, "moved", "abcdef", 7)
    path = tmp_path / "moved" / "tokenizer.json"
    table = json.loads(path.read_text())
    swap = {"</s>": 8, "f": 2}
    table["model"]["vocab"] |= swap
    for one in table["added_tokens"]:
        one["id"] = swap.get(one["content"], one["id"])
    path.write_text(json.dumps(table))
    monkeypatch.chdir(place)
    text = f"{{merge_method: linear, base_model: v1, models: [{{model: v1}}, {{model: {tmp_path}/moved}}], "
    made = ours(text + f"parameters: {{weight: 1}}, tokenizer_source: {tmp_path}/moved}}", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 8
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 8
    both = [tensors(folder)[ROWS[0]] for folder in (place / "v1", tmp_path / "moved")]
    torch.testing.assert_close(made[ROWS[0]][8], (both[0][2] + both[1][8]) / 2)


def test_larger_vocabularies_are_refused_with_the_way_out(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    Path("merge.yaml").write_text(f"{{{LINEAR}}}")
    with pytest.raises(
        optx.ShapeError, match=r"has shape \(9, 16\) in 'v1' and \(10, 16\) in 'v2'.*tokenizer_source"
    ):
        read_config("merge.yaml")


REFUSED = {
    "kind": ("{tokens: {a: {source: {kind: sero}}}}", "kind of token 'a' is 'sero'. Near: 'zero'"),
    "two": (
        "{tokens: {a: {source: {kind: model_token, model: v1}}}}",
        "must have either 'token' or 'token_id'",
    ),
    "key": ("{pad: 8}", "a tokenizer has no 'pad'. Near: .*'pad_to_multiple_of'"),
    "padding": ("{pad_to_multiple_of: 0}", "pad_to_multiple_of is 0; it must be at least 1"),
    "source": ("{source: nowhere}", "there is no file or folder 'nowhere'"),
    "no source": ("{tokens: {a: {force: true}}}", "token 'a' .*has no source"),
    "no row": (
        "{tokens: {a: {source: {kind: model_token, model: v1, token_id: 99}, force: true}}}",
        "has no 99 among its 9 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(
    case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    tokenizer, message = REFUSED[case]
    with pytest.raises(optx.OptxError, match=message):
        ours(f"{{{LINEAR}, tokenizer: {tokenizer}}}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_chat_templates(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(place)
    template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    text = "{merge_method: linear, models: [{model: v1}], parameters: {weight: 1}, chat_template: "
    text += f'"{template}"}}'
    ours(text, tmp_path / "out")
    said: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert said.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi!"
    auto = f"{{merge_method: linear, models: [{{model: v1}}, {{model: {tmp_path}/out}}], "
    auto += "parameters: {weight: 1}, "
    ours(auto + "chat_template: auto}", tmp_path / "auto")
    assert AutoTokenizer.from_pretrained(tmp_path / "auto").chat_template == template
    with pytest.raises(
        optx.OptxError, match="chat_template is 'chatml'; it must be 'auto' or a Jinja template"
    ):
        ours(auto + "chat_template: chatml}", tmp_path / "no")
    with pytest.raises(optx.OptxError, match="is a file; a tokenizer or a chat template needs a folder"):
        ours(text, tmp_path / "no.safetensors")
