"""Files that PEFT wrote: the same logits here, or a refusal that names what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    assert_close,
    assert_refused,
    bert,
    by_peft,
    edit_config,
    gpt2,
    ids,
    in_peft,
    llama,
    outputs,
    peft_talk,
    plain,
    rewrite,
    tensors_in,
)
from peft import IA3Config, LoraConfig
from torch import Tensor, nn

import optx
from optx.inject import _peft_prefix, _peft_read

PREFIX = "base_model.model."

THEIRS: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (llama, lambda: LoraConfig(r=2, task_type="CAUSAL_LM")),
    "suffixes": (llama, lambda: LoraConfig(r=2, target_modules=["self_attn.q_proj", "up_proj", "lm_head"])),
    "regex": (llama, lambda: LoraConfig(r=2, target_modules=r".*1\..*(q|v)_proj", use_rslora=True)),
    "all linear": (llama, lambda: LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
    "excluded": (llama, lambda: LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*\.0\..*")),
    "one layer": (llama, lambda: LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=1)),
    "layers of a stack": (
        llama,
        lambda: LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"),
    ),
    "ranks": (
        llama,
        lambda: LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 4},
            alpha_pattern={"1.*q_proj": 3},
        ),
    ),
    "rank above the matrix": (llama, lambda: LoraConfig(r=20, target_modules=["q_proj", "down_proj"])),
    "embeddings": (llama, lambda: LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], use_dora=True)),
    "norms": (llama, lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])),
    "bert head": (bert, lambda: LoraConfig(r=2, task_type="SEQ_CLS", lora_bias=True)),
    "bert biases": (bert, lambda: LoraConfig(r=2, bias="lora_only", target_modules=["query", "dense"])),
    "bert all biases": (bert, lambda: LoraConfig(r=2, bias="all", target_modules=["query"])),
    "gpt2": (gpt2, lambda: LoraConfig(r=2, fan_in_fan_out=True, use_dora=True, target_modules=["c_attn"])),
    "plain": (plain, lambda: LoraConfig(r=2, target_modules=["emb", "conv1", "conv", "one", "fc"])),
    "plain dora": (plain, lambda: LoraConfig(r=2, use_dora=True, target_modules=["emb", "conv", "fc"])),
    "pissa's shape": (
        llama,
        lambda: LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["q_proj"]),
    ),
    "ia3 llama": (llama, lambda: IA3Config(task_type="CAUSAL_LM")),
    "ia3 bert": (bert, lambda: IA3Config(task_type="SEQ_CLS")),
    "ia3 gpt2": (gpt2, lambda: IA3Config(fan_in_fan_out=True)),
    "ia3 conv": (plain, lambda: IA3Config(target_modules=["conv", "one", "fc"], feedforward_modules=["one"])),
    "ia3 regex": (
        llama,
        lambda: IA3Config(target_modules=r".*_proj", feedforward_modules=r".*(down|o)_proj"),
    ),
}
theirs = pytest.mark.parametrize("case", THEIRS)


@theirs
def test_an_adapter_of_pefts_gives_the_same_here(case: str, tmp_path: Path) -> None:
    make, config = THEIRS[case]
    wanted = outputs(by_peft(make(), config(), tmp_path / "theirs"))
    model = make()
    assert (wanted - outputs(model)).abs().max() > 0.01
    if case == "bert biases" and not any(key.endswith("bias") for key in tensors_in(tmp_path / "theirs")):
        # PEFT 0.17 loses the biases that it trained: with a warning at most there, with an error here.
        assert_refused(tmp_path / "theirs", r"'.*query\.lora_bias_delta' is missing", model)
        return
    handle = optx.attach(model, tmp_path / "theirs")
    assert_close(outputs(model), wanted)

    handle.save(tmp_path / "ours")
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    added = {key for key in after if key.endswith(("lora_bias_delta", "bitfit.delta"))}
    left_out = {key for key in before if key.endswith("base_layer.weight")}
    assert after.keys() - added == before.keys() - left_out
    for key in after.keys() - added:
        tolerance = 1e-7 if key.endswith(".bias") and added else 0.0  # base + difference is rounded again
        assert_close(after[key], before[key], tolerance)
    assert_close(outputs(in_peft(make(), tmp_path / "ours")), wanted)


@pytest.mark.parametrize("case", ["llama", "all linear", "plain", "ia3 llama", "bert head"])
def test_twenty_steps_in_peft_load_here(case: str, tmp_path: Path) -> None:
    def train(adapted: Any) -> None:
        opt = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(20):
            out = adapted(ids())
            (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
            opt.step()
            opt.zero_grad()

    make, config = THEIRS[case]
    wanted = outputs(by_peft(make(), config(), tmp_path, train))
    model = make()
    optx.attach(model, tmp_path)
    assert (wanted - outputs(make())).abs().max() > 0.01
    assert_close(outputs(model), wanted)


def test_heads_and_all_biases_at_once(tmp_path: Path) -> None:
    """PEFT saves the head's bias three times, once under each name that its wrapper gives it."""
    wanted = outputs(by_peft(bert(), LoraConfig(r=2, task_type="SEQ_CLS", bias="all"), tmp_path))
    model = bert()
    handle = optx.attach(model, tmp_path)
    assert [kept.path for kept in handle.saved] == ["classifier"]
    assert_close(outputs(model), wanted)


def test_a_resized_vocabulary_comes_along(tmp_path: Path) -> None:
    """PEFT then saves the embeddings whole, under their plain names."""
    wide = llama(vocab_size=70)
    adapted = by_peft(wide, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    with peft_talk():
        adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.weight" in tensors_in(tmp_path)
    model = llama(vocab_size=70)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    handle = optx.attach(model, tmp_path)
    assert [kept.path for kept in handle.saved] == ["lm_head"]  # the embedding is the model's already
    assert_close(outputs(model), outputs(adapted))
    with pytest.raises(
        optx.FileError, match=r"lm_head.weight' has shape \(70, 16\), the model needs \(64, 16\)"
    ):
        optx.attach(llama(), tmp_path)


def test_a_served_embedding_of_another_base_is_told(tmp_path: Path) -> None:
    by_peft(llama(), LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.warns(UserWarning, match=r"another model.embed_tokens.weight than this model has"):
        optx.attach(other, tmp_path)
    optx.attach(llama().to(torch.bfloat16), tmp_path)  # the same, in the model's own precision


def test_older_names_of_doras_magnitude(tmp_path: Path) -> None:
    make, config = THEIRS["all linear"]
    wanted = outputs(by_peft(make(), config(), tmp_path))
    rewrite(tmp_path, {re.sub("vector$", "vector.weight", k): t for k, t in tensors_in(tmp_path).items()})
    model = make()
    optx.attach(model, tmp_path)
    assert_close(outputs(model), wanted)


def test_the_minimal_config(tmp_path: Path) -> None:
    by_peft(plain(), LoraConfig(r=2, lora_alpha=3, target_modules=["fc"]), tmp_path)
    wanted = outputs(in_peft(plain(), tmp_path))
    text = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["fc"]}'
    (tmp_path / "adapter_config.json").write_text(text)
    model = plain()
    optx.attach(model, tmp_path)
    assert_close(outputs(model), wanted)


# ---- refusals ---------------------------------------------------------------------------------------


def one_of_pefts(folder: Path, **options: Any) -> Path:
    by_peft(llama(), LoraConfig(r=2, target_modules=["q_proj"], **options), folder)
    return folder


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("velora_config", {"a": 1}),
        ("kasa_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
    ],
)
def test_options_that_optx_lacks_are_refused(option: str, value: Any, tmp_path: Path) -> None:
    one_of_pefts(tmp_path)
    edit_config(tmp_path, **{option: value})
    assert_refused(tmp_path, rf"trained with PEFT's {option}=")


def test_options_of_a_later_peft_are_told(tmp_path: Path) -> None:
    one_of_pefts(tmp_path)
    edit_config(tmp_path, use_something=True, other_thing=None)
    with pytest.warns(
        UserWarning, match=r"PEFT's option use_something=True, which this version .* leaves out"
    ):
        optx.attach(llama(), tmp_path)


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    by_peft(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]), tmp_path)
    assert_refused(tmp_path, r"is of PEFT's type LOHA; optx reads LORA, IA3 and PREFIX_TUNING")


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config, peft.PrefixTuningConfig])
def test_every_option_of_this_peft_is_known(kind: Any) -> None:
    """What is neither read nor refused is told when it is in a file; a field of a new PEFT must be judged."""
    known = _peft_prefix._KNOWN if kind is peft.PrefixTuningConfig else _peft_read._KNOWN
    fields = {field.name for field in dataclasses.fields(kind)} - {"runtime_config"}  # is not written
    assert sorted(fields - {*known, *_peft_read._FOREIGN}) == []


KEY = "model.layers.1.self_attn.q_proj"


def test_a_renamed_key_is_named(tmp_path: Path) -> None:
    tensors = tensors_in(one_of_pefts(tmp_path))
    tensors[f"{PREFIX}{KEY}.lora_C.weight"] = tensors.pop(f"{PREFIX}{KEY}.lora_B.weight")
    rewrite(tmp_path, tensors)
    assert_refused(tmp_path, rf"'{PREFIX}{KEY}.lora_C.weight', for which this model has no place")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tensors = tensors_in(one_of_pefts(tmp_path))
    del tensors[f"{PREFIX}{KEY}.lora_B.weight"]
    rewrite(tmp_path, tensors)
    assert_refused(
        tmp_path, rf"'{PREFIX}{KEY}.lora_B.weight' is missing\. Near: '{PREFIX}{KEY}.lora_A.weight'"
    )


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    tensors = tensors_in(one_of_pefts(tmp_path))
    tensors[f"{PREFIX}{KEY}.lora_B.weight"] = torch.zeros(8, 2)
    rewrite(tmp_path, tensors)
    assert_refused(tmp_path, rf"'{PREFIX}{KEY}.lora_B.weight' has shape \(8, 2\), the model needs \(16, 2\)")


def test_codes_in_the_place_of_floats_are_named(tmp_path: Path) -> None:
    tensors = tensors_in(one_of_pefts(tmp_path))
    tensors[f"{PREFIX}{KEY}.lora_B.weight"] = torch.ones(16, 2, dtype=torch.int8)
    rewrite(tmp_path, tensors)
    assert_refused(tmp_path, rf"'{PREFIX}{KEY}.lora_B.weight' is of torch.int8, the model's of torch.float32")


def test_modules_that_the_config_means_and_the_file_lacks(tmp_path: Path) -> None:
    tensors = tensors_in(one_of_pefts(tmp_path))
    rewrite(tmp_path, {k: t for k, t in tensors.items() if KEY not in k})
    assert_refused(tmp_path, rf"no tensors for '{KEY}', which target_modules=\['q_proj'\] means")


def test_modules_that_the_file_has_and_the_config_does_not_mean(tmp_path: Path) -> None:
    one_of_pefts(tmp_path)
    edit_config(tmp_path, target_modules=r".*0.*q_proj")
    assert_refused(tmp_path, rf"tensors for '{KEY}', which target_modules='.*' does not mean")


def test_a_file_for_another_model(tmp_path: Path) -> None:
    one_of_pefts(tmp_path)
    assert_refused(
        tmp_path,
        r"has 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', and the model has no module "
        r"'model.layers.0.self_attn.q_proj': it was saved for another model\. Near: ",
        bert(),
    )
    assert_refused(tmp_path, rf"no module '{KEY}'", llama(num_hidden_layers=1))
    assert_refused(tmp_path, r"has shape \(2, 16\), the model needs \(2, 32\)", llama(hidden_size=32))


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wanted = outputs(by_peft(copy.deepcopy(tied), config, tmp_path))
    assert_refused(
        tmp_path, r"tied to 'model.embed_tokens.weight'. Untie it first: model.lm_head.weight =", tied
    )
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.clone())
    optx.attach(tied, tmp_path)
    assert_close(outputs(tied), wanted)
