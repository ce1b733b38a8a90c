"""Whole models merged as mergekit's YAML says: the same numbers as mergekit 0.1.5, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_yaml_cases import differences, folders, ours, tensors, theirs, within_ulps

import optx

yaml: Any = pytest.importorskip("yaml")

SLERP = """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
parameters: {normalize: true, int8_mask: true}
"""
EXACT = {
    "linear": "{merge_method: linear, models: [{model: a, parameters: {weight: 1.0}}, "
    "{model: b, parameters: {weight: 0.3}}, {model: c, parameters: {weight: 0.5}}]}",
    "linear sum": "{merge_method: linear, base_model: base, models: [{model: a}, {model: base}], "
    "parameters: {weight: [0.2, 0.9], normalize: 'no'}}",
    "slerp": SLERP,
    "slerp slices": "{merge_method: slerp, base_model: a, slices: [{sources: [{model: a, layer_range: "
    "[0, 2]}, {model: b, layer_range: [1, 3]}]}, {sources: [{model: b, layer_range: [0, 4]}, {model: a, "
    "layer_range: [0, 4]}], parameters: {t: [1, 0]}}], parameters: {t: '0.25'}}",
    "passthrough": "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 3]}]}, "
    "{sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, "
    "value: 0.5}, {value: 1}]}}]}]}",
    "task arithmetic": "{merge_method: task_arithmetic, base_model: base, models: [{model: a, parameters: "
    "{weight: [0.1, 0.9]}}, {model: b, parameters: {weight: -0.4}}], parameters: {lambda: 0.7, "
    "normalize: true}}",
    "ties": TIES,
    "dare of all": "{merge_method: dare_ties, base_model: base, models: [{model: a}, {model: b}], "
    "parameters: {weight: 0.5, density: 1, rescale: 'false'}}",
    "model stock": "{merge_method: model_stock, base_model: base, models: [{model: a}, {model: b}, "
    "{model: c}]}",
    "model stock rows": "{merge_method: model_stock, base_model: base, models: [{model: a}, {model: b}], "
    "parameters: {filter_wise: [{filter: mlp, value: true}, {value: false}]}}",
    "nearswap": "{merge_method: nearswap, base_model: base, models: [{model: a}], parameters: "
    "{t: [0.01, 0.1]}}",
    "nuslerp": "{merge_method: nuslerp, models: [{model: a, parameters: {weight: 0.3}}, {model: b, "
    "parameters: {weight: 0.6}}], parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}}",
    "nuslerp of changes": "{merge_method: nuslerp, base_model: base, models: [{model: a}, {model: b}], "
    "parameters: {weight: [{filter: mlp, value: 0.1}, {value: 0.4}]}}",
    "breadcrumbs": "{merge_method: breadcrumbs_ties, base_model: base, models: [{model: a}, {model: b}], "
    "parameters: {weight: 0.5, density: [0.9, 0.3], gamma: 0.05, rescale: true}}",
    "sce": "{merge_method: sce, base_model: base, models: [{model: a}, {model: b}, {model: c}], parameters: "
    "{select_topk: [0.3, 1]}}",
    "multislerp": "{merge_method: multislerp, models: [{model: a}, {model: b}, {model: c}], parameters: "
    "{weight: "
    "[{filter: mlp, value: 0.1}, {value: 0.4}], normalize_weights: [true, false]}}",
    "multislerp of changes": "{merge_method: multislerp, base_model: base, models: [{model: a}, {model: b}], "
    "parameters: {weight: 1}}",
    "karcher": "{merge_method: karcher, models: [{model: a}, {model: b}, {model: c}], parameters: {max_iter: "
    "'5', tol: 1e-7}}",
    "della of all": "{merge_method: della, base_model: base, models: [{model: a}, {model: b}], parameters: "
    "{weight: 0.5, density: 1}}",
    "arcee fusion": "{models: [{model: a}, {model: b}], merge_method: arcee_fusion, base_model: a}",
}


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(name: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llamas)
    made, wrong = differences(EXACT[name], tmp_path)
    assert not wrong
    for model in "ab":  # it did something
        before = tensors(llamas / model)
        assert len(made) > len(before) or any(not torch.equal(made[n], t) for n, t in before.items())


def test_ties_rescaled(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms are summed in another order: a few last digits."""
    monkeypatch.chdir(llamas)
    text = TIES.replace("int8_mask: true", "rescale: true")
    made, wrong = differences(text, tmp_path, within_ulps(4))
    assert not wrong
    plain = ours(TIES, tmp_path / "plain")
    assert any(not torch.equal(plain[name], tensor) for name, tensor in made.items())


FAMILIES = {
    "tied Llama": ("Llama", {"tie_word_embeddings": True}),
    "GPT-2": ("GPT2", {}),
    "Qwen2": ("Qwen2", {}),
    "BERT": ("Bert", {"num_key_value_heads": 2}),
}


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = FAMILIES[family]
    monkeypatch.chdir(folders(tmp_path, kind, **changes))
    assert not differences(SLERP, tmp_path / "1")[1]
    text = TIES.replace(
        "  - {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}\n", ""
    )
    assert not differences(text, tmp_path / "2")[1]
    made, other = ours(EXACT["passthrough"], tmp_path / "3"), tmp_path / "4"
    if kind == "Qwen2":  # mergekit leaves layer_types as it was, which transformers refuses
        with pytest.raises(Exception, match="num_hidden_layers"):
            theirs(EXACT["passthrough"], other)
    else:
        theirs(EXACT["passthrough"], other)
    found = tensors(other)
    assert set(made) == set(found)
    assert all(torch.equal(made[name], tensor) for name, tensor in found.items())
    import transformers

    auto = "AutoModelForSequenceClassification" if kind == "Bert" else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(tmp_path / "3")
    assert model.config.num_hidden_layers == 6
    model(torch.tensor([[1, 2, 3]]))


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["linear", "slerp", "passthrough", "task arithmetic", "model stock", "dare of all"]
)
def test_narrow_dtypes(
    name: str, dtype: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mergekit sorts nothing."""
    monkeypatch.chdir(llamas)
    text = yaml.safe_dump(yaml.safe_load(EXACT[name]) | {"dtype": dtype})
    assert not differences(text, tmp_path)[1]
    wide = yaml.safe_dump(yaml.safe_load(EXACT[name]) | {"out_dtype": dtype})
    assert not differences(wide, tmp_path / "out")[1]
    told = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert told.get("dtype", told.get("torch_dtype")) == dtype


def test_widths_are_promoted(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, "Llama", "base a b c", dtype=torch.bfloat16)
    (tmp_path / "w").symlink_to(llamas / "a")
    monkeypatch.chdir(tmp_path)
    made, wrong = differences(EXACT["linear"].replace("model: c", "model: w"), tmp_path / "out")
    assert not wrong
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}


def test_della(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random, so by distribution: how many are kept, the larger the likelier; another seed, other ones."""
    monkeypatch.chdir(llamas)
    text = "{merge_method: della_linear, base_model: base, models: [{model: a}], parameters: {weight: 1, "
    text += "density: 0.4, epsilon: 0.3, rescale: RESCALE}}"
    base, after, name = tensors(llamas / "base"), tensors(llamas / "a"), "model.embed_tokens.weight"
    change = (after[name] - base[name]).abs()
    upper = change > change.median(dim=1, keepdim=True).values
    made = [ours(text.replace("RESCALE", "false"), tmp_path / f"{seed}", seed)[name] for seed in range(12)]
    kept = torch.stack([one != base[name] for one in made]).float().mean(0)
    assert abs(float(kept.mean()) - 0.4) < 0.02
    assert float(kept[upper].mean()) - float(kept[~upper].mean()) == pytest.approx(0.3, abs=0.06)
    scaled = ours(text.replace("RESCALE", "true"), tmp_path / "scaled", 3)[name]
    assert torch.equal(scaled != base[name], made[3] != base[name])
    torch.testing.assert_close((scaled - base[name]).abs().sum(), change.sum(), rtol=1e-4, atol=0)
    with pytest.raises(optx.OptxError, match=r"density 0\.4 with epsilon 0\.45 goes beyond 0 or 1"):
        ours(text.replace("0.3,", "0.45,").replace("RESCALE", "true"), tmp_path / "no")


numbers = st.sampled_from([0.25, 0.5, 0.75, 1])
values = numbers | st.lists(numbers, min_size=1, max_size=5)
conditions = st.lists(
    st.tuples(st.sampled_from(["mlp", "self_attn", "norm", "q_proj", "layers.1.", "*"]), values).map(
        lambda pair: {"filter": pair[0], "value": pair[1]}
    ),
    min_size=1,
    max_size=3,
)
some = values | st.tuples(conditions, values).map(lambda pair: [*pair[0], {"value": pair[1]}])


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    """A file: a method, with settings at any of its places."""
    method = draw(
        st.sampled_from(["linear", "slerp", "task_arithmetic", "ties", "passthrough", "breadcrumbs"])
    )
    names = {"slerp": ["base", "a"], "passthrough": ["a"]}.get(method) or ["base", "a", "b"]
    keys = {"slerp": ["t"], "passthrough": ["scale"], "linear": ["weight"], "task_arithmetic": ["weight"]}
    found = {
        "merge_method": method,
        "parameters": {key: draw(some) for key in keys.get(method, ["weight", "density"])},
    }
    if method not in ("passthrough", "linear"):
        found["base_model"] = "base"

    def part(name: str, **more: Any) -> dict[str, Any]:
        own = {key: draw(some) for key in found["parameters"] if key != "t" and draw(st.booleans())}
        return {"model": name, **more, **({"parameters": own} if own else {})}

    if draw(st.booleans()):
        return found | {"models": [part(name) for name in names]}
    slices = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        begins = [draw(st.integers(0, 4 - size)) for _ in names]
        sources = [part(n, layer_range=[b, b + size]) for n, b in zip(names, begins, strict=True)]
        own = {key: draw(some) for key in found["parameters"] if draw(st.booleans())}
        slices.append({"sources": sources, "parameters": own})
    return found | {"slices": slices}


@settings(max_examples=25)
@given(merges())
def test_any_settings(llamas: Path, tmp_path_factory: pytest.TempPathFactory, merge: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(llamas)
        assert not differences(yaml.safe_dump(merge), tmp_path_factory.mktemp("merge"))[1]
