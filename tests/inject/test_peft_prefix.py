"""Prefix tuning in PEFT's files, both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    assert_close,
    assert_refused,
    attached,
    bert,
    by_peft,
    edit_config,
    gpt2,
    in_peft,
    llama,
    outputs,
    rewrite,
    shake,
    tensors_in,
)

import optx

ROPES: dict[str, Any] = {
    "plain": {},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "wide heads": {"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("rope", ROPES)
def test_prefixes_are_pefts_with_their_keys_turned(rope: str, tmp_path: Path) -> None:
    """PEFT puts the real tokens behind the prefix; here they stay at their positions."""
    model = llama(**ROPES[rope])
    base = outputs(model)
    handle = optx.attach(model, optx.PrefixTuning(length=5))
    shake(handle.parameters(), by=1.0)
    handle.save(tmp_path)
    wanted = outputs(model)
    assert (wanted - base).abs().max() > 0.1
    assert_close(outputs(in_peft(llama(**ROPES[rope]), tmp_path)), wanted)
    fresh = llama(**ROPES[rope])
    again = optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), wanted)
    assert again.injection == handle.injection


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_prefixes_of_pefts_load_here(rope: str, projected: bool, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projected)
    theirs = by_peft(llama(**ROPES[rope]), config, tmp_path)
    model = llama(**ROPES[rope])
    if rope == "wide heads" and tensors_in(tmp_path)["prompt_embeddings"].shape[1] != 2 * 2 * 2 * 12:
        with pytest.raises(RuntimeError):  # PEFT 0.17, whose own model can't run
            outputs(theirs)
        assert_refused(tmp_path, r"make heads of width 4, the model's have 12\. PEFT 0\.17", model)
        return
    base = outputs(model)
    handle = optx.attach(model, tmp_path)
    assert (outputs(theirs) - base).abs().max() > 0.1
    assert_close(outputs(model), outputs(theirs))
    handle.save(tmp_path / "again")
    assert_close(
        tensors_in(tmp_path / "again")["prompt_embeddings"], tensors_in(tmp_path)["prompt_embeddings"], 1e-6
    )


def test_a_prefix_without_its_mlp_goes_to_peft(tmp_path: Path) -> None:
    model = llama()
    handle = attached(model, optx.PrefixTuning(length=3, mlp=6))
    with pytest.warns(UserWarning, match=r"made by an MLP \(optx.fold_prefix drops it\)"):
        handle.save(tmp_path)
    wanted, fresh = outputs(model), llama()
    optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), wanted)
    optx.fold_prefix(handle)
    handle.save(tmp_path)
    assert_close(outputs(in_peft(llama(), tmp_path)), wanted)


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=1, sliding_window=8, **sizes))


@pytest.mark.parametrize(
    ("make", "more", "why"),
    [
        (gpt2, {}, "only rotary positions can make up for"),
        (lambda: bert("BertModel"), {}, "only its prefix tuning of causal language models"),
        (mistral, {}, "a sliding window hides its prefix"),
        (llama, {"targets": r".*0\.self_attn"}, "it has a prefix in each of the 2 layers"),
        (llama, {"modules_to_save": ["lm_head"]}, "has no modules_to_save"),
    ],
)
def test_prefixes_that_peft_would_compute_otherwise(
    make: Callable[[], Any], more: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = make().eval()
    start = copy.deepcopy(model)
    handle = attached(model, optx.PrefixTuning(length=3), **more)
    with pytest.warns(UserWarning, match=rf"PEFT can't read this adapter, as .*{why}"):
        handle.save(tmp_path)
    optx.attach(start, tmp_path)
    assert torch.equal(outputs(start), outputs(model))


def test_prefixes_that_are_not_for_this_model(tmp_path: Path) -> None:
    by_peft(gpt2(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), tmp_path / "gpt2")
    assert_refused(tmp_path / "gpt2", r"can't be read for this model: it moves the real tokens", gpt2())
    by_peft(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), tmp_path / "llama")
    deeper = llama(num_hidden_layers=3)
    assert_refused(tmp_path / "llama", r"has shape \(4, 32\), the model needs \(4, 48\): 3 layers", deeper)
    edit_config(tmp_path / "llama", task_type="SEQ_CLS")
    assert_refused(tmp_path / "llama", r"is for SEQ_CLS; optx reads prefix tuning of causal language models")


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "part of each head is turned": ("GPTNeoX", {}),
    "all of it": ("GPTNeoX", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}),
    "the module turns a part": ("Phi", {"num_key_value_heads": 2}),
    "one head of keys": ("Qwen2", {"num_key_value_heads": 1}),
    "keys spread before attention": ("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_prefixes_of_other_families_load(case: str, tmp_path: Path) -> None:
    """Case neox_prefix.py."""
    import transformers

    name, more = FAMILIES[case]

    def make() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, num_attention_heads=4, **more)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = by_peft(make(), config, tmp_path, lambda model: shake(model.prompt_encoder.parameters(), by=1.0))
    model = make()
    base = outputs(model)
    handle = optx.attach(model, tmp_path)
    assert (outputs(model) - base).abs().max() > 0.05
    assert_close(outputs(model), outputs(theirs))
    handle.save(tmp_path / "again")
    assert_close(outputs(in_peft(make(), tmp_path / "again")), outputs(theirs))


def test_positions_that_a_prefix_cannot_be_turned_to(tmp_path: Path) -> None:
    import transformers

    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.FalconConfig(**SIZES, num_attention_heads=4, alibi=True, multi_query=False)
        return transformers.FalconForCausalLM(config).eval()

    by_peft(make(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), tmp_path)
    assert_refused(tmp_path, r"can't be read for this model: its positions are ALiBi's", make())


def test_a_prefix_with_more_beside_it_is_refused(tmp_path: Path) -> None:
    attached(llama(), optx.PrefixTuning(length=3)).save(tmp_path)
    tensors = tensors_in(tmp_path)
    edit_config(tmp_path, modules_to_save=["lm_head"])
    assert_refused(tmp_path, r"modules_to_save=\['lm_head'\]; optx reads prefixes alone")
    edit_config(tmp_path, modules_to_save=None, of_2027=True)
    rewrite(tmp_path, tensors)
    with pytest.warns(UserWarning, match=r"option of_2027=True, which this version"):
        optx.attach(llama(), tmp_path)
    rewrite(tmp_path, {**tensors, "base_model.model.lm_head.weight": torch.ones(2)})
    assert_refused(tmp_path, r"'base_model.model.lm_head.weight' beside 'prompt_embeddings'")


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    """As PEFT 0.17 saves prefixes of models whose head_dim is not hidden_size / num_attention_heads."""
    attached(llama(), optx.PrefixTuning(length=3)).save(tmp_path)
    edit_config(tmp_path, num_attention_heads=2)
    assert_refused(
        tmp_path, r"token_dim=8 and num_attention_heads=2 make heads of width 4, the model's have 8"
    )
