"""A merge's YAML as on model cards: what mergekit takes is taken, and what has no effect is said."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_yaml_cases import differences, ours, tensors
from safetensors.torch import load_file, save_file

import optx
from optx.delta._mergekit import read_config

yaml: Any = pytest.importorskip("yaml")

# mergekit's own examples (its repository's examples/*.yml), with the models' names replaced.
UPSTREAM = {
    "arcee_fusion": "models:\n  - model: a\n  - model: b\nmerge_method: arcee_fusion\nbase_model: a\n",
    "bio-merge": """
models:
  - model: a
    parameters: {density: 0.5, weight: 0.5}
  - model: b
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
""",
    "gradient-slerp": """
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5 # fallback for rest of tensors
""",
    "linear": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
""",
    "44layer": """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
merge_method: passthrough
""",
    "ties": """
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: c
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
""",
}


@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mergekits_examples(
    name: str, dtype: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 too, as they are; there, numbers that are equal may be sorted otherwise."""
    monkeypatch.chdir(llamas)
    text = f"{UPSTREAM[name]}dtype: {dtype}\n"
    if dtype == "float16" and name in ("bio-merge", "ties", "arcee_fusion"):
        assert ours(text, tmp_path / "ours")
        return
    assert not differences(text, tmp_path)[1]


FORMS = {
    "numbers in quotes": "{merge_method: linear, models: [{model: a, parameters: {weight: '1e-1'}}, "
    "{model: b, "
    "parameters: {weight: ['0.5', 1]}}]}",
    "bools in quotes": "{merge_method: ties, base_model: base, models: [{model: a}], parameters: {weight: 1, "
    "density: '0.5', normalize: 'True', int8_mask: 'yes', rescale: 0}}",
    "all four places": "{merge_method: task_arithmetic, base_model: base, parameters: {weight: 9, lambda: "
    "0.5}, "
    "slices: [{parameters: {weight: 3}, sources: [{model: base, layer_range: ['0', '2']}, {model: a, "
    "layer_range: "
    "[0, 2], parameters: {weight: [{filter: mlp, value: 0.25}]}}, {model: b, layer_range: [0.0, 2.0]}]}, "
    "{sources: "
    "[{model: base, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, "
    "4]}]}]}",
    "a base of the slice": "{merge_method: slerp, base_model: a, parameters: {t: 0.25}, slices: "
    "[{base_model: b, "
    "sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]}]}",
    "the base in between": "{merge_method: task_arithmetic, base_model: base, models: [{model: a, "
    "parameters: "
    "{weight: 0.4}}, {model: base, parameters: {weight: 7, density: 0.1}}, {model: b, parameters: "
    "{weight: 1}}]}",
    "a filter of all": "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: "
    "[{filter: mlp, "
    "value: 1}, {filter: '*', value: [0, 1]}, {value: 0.5}]}}",
    "one table": "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: {value: [0, "
    "0.5]}}}",
    "one value in a list": "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: "
    "[0.3]}}",
    "a table for a model": "{merge_method: linear, models: [{model: {model: {path: a}}}, {model: {model: "
    "b}}], "
    "parameters: {weight: 1}}",
    "filters by number": "{merge_method: linear, models: [{model: a}, {model: b, parameters: {weight: "
    "[{filter: "
    "'layers.1.', value: 0}, {value: 1}]}}], parameters: {weight: 1}}",
    "torch's dtype": "{merge_method: linear, models: [{model: a}], parameters: {weight: 2, normalize: "
    "false}, "
    "dtype: torch.bfloat16}",
    "nothing in between": "{merge_method: passthrough, models: [{model: a}], parameters: {}, base_model: ~, "
    "tokenizer_source: ~}",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_mergekit_takes(
    form: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llamas)
    assert not differences(FORMS[form], tmp_path)[1]


NOTED = {
    "slerp": (
        "{t: 0.5, embed_slerp: true, int8_mask: true}",
        ["embed_slerp is ignored", "int8_mask is ignored"],
    ),
    "task_arithmetic": ("{weight: 1, density: 0.5}", ["density is ignored: task_arithmetic prunes nothing"]),
    "ties": ("{weight: 1, int8_mask: true}", ["int8_mask is ignored: it does not change the result"]),
    "nearswap": ("{t: 0.5, weight: 1}", ["weight is ignored: nearswap has no such parameter"]),
}


@pytest.mark.parametrize("method", NOTED)
def test_what_has_no_effect_is_said(
    method: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llamas)
    parameters, notes = NOTED[method]
    text = f"{{merge_method: {method}, base_model: base, models: [{{model: a}}], parameters: {parameters}}}"
    assert not differences(text, tmp_path)[1]
    found = read_config("merge.yaml").notes
    assert len(found) == len(notes)
    assert all(any(note in one for one in found) for note in notes)


REFUSED = {
    "missing": ("{merge_method: slerp, base_model: a, models: [{model: b}]}", "slerp needs 't'; give it "
    "under"),
    "of one": (
        "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b}]}",
        "'b' has no 'weight'; give it under its parameters",
    ),
    "the base's": (
        "{merge_method: linear, base_model: base, models: [{model: a, parameters: {weight: 1}}]}",
        "'base' has no 'weight'",
    ),
    "filtered": (
        "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: [{filter: mlp, value: "
        "1}]}}",
        r"no filter of 't' lets 'lm_head\.weight' through; add an entry",
    ),
    "no base": ("{merge_method: slerp, models: [{model: a}, {model: b}]}", "slerp needs base_model"),
    "base of one": ("{merge_method: model_stock, base_model: a, models: [{model: b}]}", "at least 3 models"),
    "nothing": ("{merge_method: linear, models: []}", "'models' must be a list"),
    "of lists": ("{merge_method: linear, models: [[a]]}", "one of 'models' is a list; it must be a table"),
    "words": ("{merge_method: linear, models: [a, b]}", "one of 'models' is a str; it must be a table"),
    "mixed": (
        "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: [{filter: mlp, value: "
        "1}, 0.5]}}",
        "'t' has filters; each of its entries must be a table",
    ),
    "twice": ("{merge_method: linear, models: [{model: a}, {model: ./a}]}", "has './a' twice"),
    "revision": ("{merge_method: linear, models: [{model: a@main}]}", "'a@main' names a revision; a "
    "folder has none"),
    "hub": ("{merge_method: linear, models: [{model: org/name@v2}]}", r"snapshot_download\('org/name'\)"),
    "zero": (
        "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: "
        "{weight: -1}}]}",
        r"the weights of 'lm_head\.weight' add up to 0|the weights of '.*' add up to 0",
    ),
    "density": (
        "{merge_method: ties, base_model: base, models: [{model: a, parameters: {weight: 1, density: "
        "[0.5, 1.5]}}]}",
        "ties: density is 1.5; it must be between 0.0 and 1.0",
    ),
    "both": (
        "{merge_method: linear, models: [{model: a}], parameters: {weight: 1}, tokenizer_source: base, "
        "tokenizer: {}}",
        "tokenizer_source and tokenizer are both there",
    ),
    "dtype": ("{merge_method: linear, models: [{model: a}], dtype: bf16}", "dtype is 'bf16'; it must be "
    "one of"),
    "architecture": (
        "{merge_method: linear, models: [{model: {model: a, override_architecture: X}}]}",
        "does not do 'override_architecture'",
    ),
    "a number of layers": (
        "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: 4}]}]}",
        "layer_range in slices.0. is 4; it must be a list of two numbers",
    ),
    "another method": ("{merge_method: ram, models: [{model: a}]}", "does not do merge_method 'ram'. Near: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(
    case: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llamas)
    text, message = REFUSED[case]
    with pytest.raises(optx.OptxError, match=message) as error:
        ours(text, tmp_path / "out")
    assert len(str(error.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == []


def test_numbers_that_are_not_finite(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that all models have stays; anything else is an error that names the tensor."""
    name = "model.layers.1.mlp.up_proj.weight"
    for folder in ("base", "a", "b"):
        (tmp_path / folder).mkdir()
        save_file(
            {**tensors(llamas / folder), "mask": torch.full((3, 3), -torch.inf).triu(1)},
            tmp_path / folder / "model.safetensors",
        )
    monkeypatch.chdir(tmp_path)
    texts = {
        "ties": "{merge_method: ties, base_model: base, models: [{model: a}, {model: b}], parameters: "
        "{weight: 1, "
        "density: 0.5}}",
        "linear": "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}",
        "slerp": "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.5}}",
    }
    for key, text in texts.items():
        assert torch.equal(ours(text, tmp_path / key)["mask"], torch.full((3, 3), -torch.inf).triu(1))
    broken = load_file("b/model.safetensors")
    broken[name][0, 0] = torch.nan
    save_file(broken, "b/model.safetensors")
    for key, text in texts.items():
        with pytest.raises(optx.OptxError, match=rf"'{name}'.*is not finite in float32"):
            ours(text, tmp_path / f"no {key}")
        assert not (tmp_path / f"no {key}").exists()
    large = "{merge_method: linear, models: [{model: a}], out_dtype: float16, parameters: "
    large += "{weight: 1e6, normalize: false}}"
    with pytest.raises(optx.OptxError, match=r"is too large for float16"):
        ours(large, tmp_path / "large")


def test_the_function_is_the_command(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file or a table; what has no effect is warned of."""
    monkeypatch.chdir(llamas)
    table = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.3}}
    wanted = ours(yaml.safe_dump(table), tmp_path / "1")
    assert optx.merge_yaml("merge.yaml", tmp_path / "2") == tmp_path / "2"
    table["parameters"] = {"t": 0.3, "density": 1}
    seen = list[str]()

    def noted(names: Iterable[str]) -> Iterable[str]:
        seen.extend(names)
        return list(seen)

    with pytest.warns(UserWarning, match="merge: density is ignored: slerp has no such parameter"):
        optx.merge_yaml(table, str(tmp_path / "3"), progress=noted)
    assert set(seen) == set(wanted)
    for folder in ("2", "3"):
        made = tensors(tmp_path / folder)
        assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
    pickled = {**table, "models": [{"model": "b.bin"}]}
    Path("b.bin").write_text("")
    with pytest.raises(optx.FileError, match=r"'b\.bin' is a pickle"):
        optx.merge_yaml(pickled, tmp_path / "4")
