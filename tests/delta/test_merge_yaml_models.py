"""What models a merge's YAML may name: with adapters, in shards, with tied heads; and the other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_yaml_cases import causal, differences, folders, ours, tensors, within_ulps
from safetensors.torch import load_file, save_file

import optx
from optx.delta._mergekit import read_config

yaml: Any = pytest.importorskip("yaml")


def adapter(place: Path, seed: int, rank: int = 2) -> None:
    """A LoRA with numbers in both factors."""
    model = causal("Llama", 0)
    handle = optx.attach(model, optx.LoRA(rank=rank), targets=r".*\.(q_proj|down_proj)")
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    handle.save(place)


@pytest.mark.parametrize(
    "form", ["a+lora", "{model: a, lora: lora}", "{model: {path: a}, lora: {path: lora}}"]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT's, of transformers
def test_a_model_with_an_adapter(
    form: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(llamas / name)
    adapter(tmp_path / "lora", 5)
    monkeypatch.chdir(tmp_path)
    text = f"merge_method: ties\nbase_model: base\nmodels: [{{model: {form}}}, {{model: b}}]\n"
    text += "parameters: {weight: [0.2, 1], density: 1}\n"
    made, wrong = differences(text, tmp_path / "out", within_ulps(4))
    assert not wrong
    plain = ours(text.replace(form, "a"), tmp_path / "plain")
    changed = {name for name, tensor in made.items() if not torch.equal(plain[name], tensor)}
    assert changed == {name for name in made if "q_proj" in name or "down_proj" in name}


def test_adapters_that_do_not_fit(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").symlink_to(llamas / "a")
    adapter(tmp_path / "lora", 5)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    good = load_file(path)
    monkeypatch.chdir(tmp_path)
    text = "{merge_method: linear, models: [{model: a+lora}], parameters: {weight: 1}}"
    for renamed, message in (
        (
            lambda n: n.replace("layers.3", "layers.7"),
            "a\\+lora: the adapter changes 'model.layers.7.*which the model lacks",
        ),
        (
            lambda n: n.replace("q_proj", "k_proj"),
            "has shape \\(8, 16\\) in the model, and \\(16, 16\\) in the adapter",
        ),
    ):
        save_file({renamed(name): tensor for name, tensor in good.items()}, path)
        with pytest.raises(optx.OptxError, match=message):
            ours(text, tmp_path / "out")
    with pytest.raises(optx.OptxError, match="there is no adapter 'none' for 'a'"):
        ours(text.replace("a+lora", "a+none"), tmp_path / "out")


def test_a_tied_and_an_untied_model(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, "Llama", "t1 t2", tie_word_embeddings=True)
    (tmp_path / "a").symlink_to(llamas / "a")
    monkeypatch.chdir(tmp_path)
    text = "{merge_method: linear, models: [{model: t1}, {model: t2}], parameters: {weight: 1}}"
    both, wrong = differences(text, tmp_path / "1")
    assert not wrong
    assert "lm_head.weight" not in both
    for first, second in (("t1", "a"), ("a", "t1")):
        mixed = text.replace("t1", "FIRST").replace("t2", second).replace("FIRST", first)
        job_notes = _notes(mixed)
        made, wrong = differences(mixed, tmp_path / first)
        assert not wrong
        told = json.loads((tmp_path / first / "ours" / "config.json").read_text())
        assert told["tie_word_embeddings"] is False
        assert any("tie_word_embeddings: false" in note for note in job_notes) == (first == "t1")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / first / "ours")
        assert torch.equal(model.lm_head.weight, made["lm_head.weight"])


def _notes(text: str) -> list[str]:
    Path("merge.yaml").write_text(text)
    return read_config("merge.yaml").notes


PASS = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


def test_what_holds_for_each_layer_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, sliding = "full_attention", "sliding_attention"
    folders(tmp_path, "Qwen2", "a b", use_sliding_window=True, layer_types=[full, sliding, full, sliding])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "b" / "config.json"
    other = json.loads(path.read_text()) | {
        "layer_types": [full, full, full, sliding],
        "mlp_only_layers": [1, 3],
    }
    path.write_text(json.dumps(other))
    first = json.loads((tmp_path / "a" / "config.json").read_text()) | {"mlp_only_layers": [2]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(first))
    ours(PASS, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["num_hidden_layers"] == 6
    assert told["layer_types"] == [full, sliding, full, full, full, sliding]
    assert told["mlp_only_layers"] == [2, 3, 5]
    del other["layer_types"]
    path.write_text(json.dumps(other))
    with pytest.raises(optx.OptxError, match=r"config\.json has 'layer_types', a value for each layer"):
        ours(PASS, tmp_path / "no")


def test_shards(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is the base's where the tensors are; otherwise files of 5 GB, with an index if several."""
    for name in ("a", "b"):
        model = causal("Llama", ord(name))
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    linear = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}"
    assert not differences(linear, tmp_path / "1")[1]
    names = {file.name for file in (tmp_path / "a").glob("*.safetensors*")}
    assert {file.name for file in (tmp_path / "1" / "ours").glob("*.safetensors*")} == names
    assert not differences(PASS, tmp_path / "2")[1]
    assert {file.name for file in (tmp_path / "2" / "ours").glob("*.safetensors*")} == {"model.safetensors"}
    from optx.delta import _checkpoint_output as output

    monkeypatch.setattr(output.new_layout, "__defaults__", (10_000,))
    made = ours(PASS, tmp_path / "3")
    index = json.loads((tmp_path / "3" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(made)
    assert all(name in load_file(tmp_path / "3" / file) for name, file in index.items())
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "3")


REFUSED = {
    "a layer too many": (
        PASS.replace("[1, 4]", "[1, 5]"),
        r"layer_range of slices\[1\] ends at 5, and 'b' has 4",
    ),
    "backwards": (
        PASS.replace("[1, 4]", "[3, 3]"),
        "layer_range in slices.1. is .3, 3.; it must be 0 <= begin < end",
    ),
    "a text": (
        PASS.replace("[1, 4]", "'[1, 4]'"),
        r"layer_range in slices\[1\] is '\[1, 4\]'; it must be a list",
    ),
    "two": (
        PASS.replace("[{model: b", "[{model: a, layer_range: [0, 3]}, {model: b"),
        "passthrough takes 1 model",
    ),
    "uneven": (
        PASS.replace("[{model: b", "[{model: a, layer_range: [0, 1]}, {model: b"),
        "have 1 and 3 layers",
    ),
    "twice": (
        PASS.replace("[{model: b", "[{model: ./b, layer_range: [0, 3]}, {model: b"),
        "has './b' twice|has 'b' twice",
    ),
    "no base": (
        "{merge_method: slerp, base_model: base, parameters: {t: 1}, slices: [{sources: [{model: a, "
        "layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]}",
        r"slerp needs the base 'base' among the sources of slices\[0\]",
    ),
    "wider": (
        PASS.replace("model: b", "model: wide"),
        r"has shape \(37, 32\) in 'wide' and \(37, 16\) in "
        r"'a'; their layers",
    ),
    "quantised": (
        "{merge_method: linear, models: [{model: a}, {model: codes}], parameters: {weight: 1}}",
        "'model.layers.0.mlp.down_proj.weight' in 'codes' belongs to int quantised weights.*Dequantise",
    ),
    "another kind": (
        "{merge_method: linear, models: [{model: a}, {model: gpt2}], parameters: {weight: 1}}",
        "is a gpt2 and 'a' a llama; they don't go",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_do_not_go_together(
    case: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(llamas / name)
    causal("Llama", 1, hidden_size=32).save_pretrained(tmp_path / "wide")  # type: ignore[operator]
    causal("GPT2", 1).save_pretrained(tmp_path / "gpt2")  # type: ignore[operator]
    (tmp_path / "codes").mkdir()
    codes = {n: (t * 9).to(torch.int8) if "mlp" in n else t for n, t in tensors(llamas / "a").items()}
    save_file(codes, tmp_path / "codes" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    text, message = REFUSED[case]
    with pytest.raises(optx.OptxError, match=message):
        ours(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_of_a_merge(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llamas)
    ours(PASS, tmp_path / "mid")
    again = "{merge_method: passthrough, slices: [{sources: [{model: MID, layer_range: [2, 6]}]}]}"
    made, wrong = differences(again.replace("MID", str(tmp_path / "mid")), tmp_path / "end")
    assert not wrong
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(made[name], tensors(llamas / "b")[name])


KILLED = """
import os, sys
from pathlib import Path
from optx.delta._mergekit import read_config
count = 0
def progress(names):
    global count
    for name in names:
        count += 1
        if count == 20:
            os.kill(os.getpid(), 9)
        yield name
read_config("merge.yaml").run(Path(sys.argv[1]), progress)
"""


def test_stopped_and_begun_with_other_settings(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not gone on with: the result is wholly that of the second file."""
    monkeypatch.chdir(llamas)
    text = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: [1, T]}}"

    class Stop(Exception):
        pass

    def stopping(names: Any) -> Any:
        for i, name in enumerate(names):
            if i == 20:
                raise Stop
            yield name

    Path("merge.yaml").write_text(text.replace("T", "2"))
    with pytest.raises(Stop):
        read_config("merge.yaml").run(tmp_path / "out", stopping)
    made, whole = (
        ours(text.replace("T", "3"), tmp_path / "out"),
        ours(text.replace("T", "3"), tmp_path / "whole"),
    )
    assert all(torch.equal(made[name], tensor) for name, tensor in whole.items())


def test_floats_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied, and computed with in a wider dtype that the file gives, or another model has."""
    monkeypatch.chdir(tmp_path)
    wide = {"m.0.w": torch.randn(8, 5), "m.1.w": torch.randn(8, 5)}
    for name, dtype in (("e4", torch.float8_e4m3fn), ("e5", torch.float8_e5m2), ("wide", torch.bfloat16)):
        save_file({key: tensor.to(dtype) for key, tensor in wide.items()}, f"{name}.safetensors")
    pick = "{merge_method: passthrough, slices: [{sources: [{model: e4.safetensors, layer_range: [1, 2]}]}]}"
    made = ours(pick, tmp_path / "1")
    assert torch.equal(made["m.0.w"].float(), wide["m.1.w"].to(torch.float8_e4m3fn).float())
    mean = "{merge_method: linear, models: [{model: e4.safetensors}, {model: e5.safetensors}], "
    mean += "parameters: {weight: 1}"
    with pytest.raises(optx.OptxError, match=r"float8_e4m3fn in every model.*give 'dtype: float32'"):
        ours(mean.replace("{model: e5.safetensors}", "") + "}", tmp_path / "2")
    both = [wide["m.0.w"].to(dtype).float() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    known = sum(both) / 2
    assert torch.equal(ours(mean + ", dtype: float32}", tmp_path / "3")["m.0.w"], known)
    other = ours(mean.replace("e5", "wide") + "}", tmp_path / "4")["m.0.w"]
    assert other.dtype == torch.float32


def test_killed_and_gone_on_with(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(llamas / name)
    monkeypatch.chdir(tmp_path)
    whole = ours(PASS, tmp_path / "whole")
    done = subprocess.run([sys.executable, "-c", KILLED, "out"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    made = ours(PASS, tmp_path / "out")
    assert all(torch.equal(made[name], tensor) for name, tensor in whole.items())
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
