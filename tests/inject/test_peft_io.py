"""Files that PEFT reads: the same logits there (methods/lora-interop.md)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    assert_close,
    attached,
    bert,
    config_in,
    gpt2,
    in_peft,
    llama,
    outputs,
    peft_talk,
    plain,
    rewrite,
    tensors_in,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx

PREFIX = "base_model.model."

# What is attached, and where, by a name for the test.
OURS: dict[str, tuple[Callable[[], Any], optx.Injection, dict[str, Any]]] = {
    "llama": (llama, optx.LoRA(rank=2), {}),
    "llama rslora": (llama, optx.LoRA(rank=4, alpha=8, rslora=True), {"targets": r".*_proj"}),
    "llama dora": (llama, optx.LoRA(rank=2, dora=True), {"targets": r".*_proj|lm_head|model\.embed_tokens"}),
    "llama tied head": (lambda: llama(tie_word_embeddings=True), optx.LoRA(rank=2), {"targets": "lm_head"}),
    "llama ranks": (
        llama,
        optx.LoRA(rank=2, rank_pattern={"0.self_attn.q_proj": 5}, alpha_pattern={"v_proj": 3.5}),
        {},
    ),
    "bert": (bert, optx.LoRA(rank=2, dropout=0.1), {"targets": nn.Linear}),
    "bert encoder": (lambda: bert("BertModel"), optx.LoRA(rank=2), {}),
    "bert head": (bert, optx.LoRA(rank=2), {"modules_to_save": ["classifier"]}),
    "bert biases": (bert, optx.LoRA(rank=2, bias="lora_only", lora_bias=True), {}),
    "bert all biases": (bert, optx.LoRA(rank=2, bias="all"), {}),
    "gpt2": (gpt2, optx.LoRA(rank=3, alpha=7.5), {}),
    "gpt2 dora": (gpt2, optx.LoRA(rank=3, dora=True), {"targets": r".*\.c_\w+"}),
    "plain": (plain, optx.LoRA(rank=1), {"targets": "emb|conv1|conv|one|fc", "modules_to_save": ["head"]}),
    "plain dora": (
        plain,
        optx.LoRA(rank=1, dora=True, rank_pattern={"conv": 3, "^fc": 4, "emb": 2}, alpha_pattern={"fc": 3}),
        {"targets": r"emb|conv1|conv|one|fc|block\.fc"},
    ),
    "plain biases": (plain, optx.LoRA(rank=1, bias="all"), {"targets": "conv|fc"}),
    "ia3 llama": (llama, optx.IA3(), {}),
    "ia3 bert": (bert, optx.IA3(), {"modules_to_save": ["classifier"]}),
    "ia3 gpt2": (gpt2, optx.IA3(), {}),
    "ia3 plain": (plain, optx.IA3(feedforward="fc|conv"), {"targets": r"conv|one|fc|block\.fc"}),
}
ours = pytest.mark.parametrize("case", OURS)


def made(case: str, folder: Path) -> tuple[Callable[[], Any], Any, optx.Handle]:
    make, injection, more = OURS[case]
    model = make()
    handle = attached(model, injection, **more)
    handle.save(folder)
    return make, model, handle


@ours
def test_peft_computes_what_was_saved_here(case: str, tmp_path: Path) -> None:
    make, model, _ = made(case, tmp_path)
    wanted = outputs(model)
    assert (wanted - outputs(make())).abs().max() > 0.01
    assert_close(outputs(in_peft(make(), tmp_path)), wanted)


@ours
def test_a_merge_gives_what_pefts_merge_gives(case: str, tmp_path: Path) -> None:
    make, model, handle = made(case, tmp_path)
    attached_outputs = outputs(model)
    with peft_talk():
        theirs = in_peft(make(), tmp_path).merge_and_unload().state_dict()
    own = handle.merge_and_unload(untie=True)
    assert_close(outputs(own), attached_outputs)
    if "tied" in case:  # PEFT merges into the embedding too
        del theirs["model.embed_tokens.weight"]
    for key, tensor in theirs.items():
        assert_close(own.state_dict()[key], tensor, 1e-6)


@ours
def test_it_comes_back_bit_for_bit_and_goes_without_a_trace(case: str, tmp_path: Path) -> None:
    make, model, handle = made(case, tmp_path)
    fresh, before = make(), make().state_dict()
    again = optx.attach(fresh, tmp_path)
    assert again.injection == handle.injection
    assert torch.equal(outputs(fresh), outputs(model))
    assert again.state_dict().keys() == handle.state_dict().keys()
    again.remove()
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in fresh.state_dict().items())


@ours
def test_without_our_metadata_it_is_still_the_same(case: str, tmp_path: Path) -> None:
    make, model, _ = made(case, tmp_path)
    # A bias is whole in PEFT's files, and its difference to the model's in ours.
    kept = {k: t for k, t in tensors_in(tmp_path).items() if not k.endswith(("bias_delta", "bitfit.delta"))}
    rewrite(tmp_path, kept)
    fresh = make()
    optx.attach(fresh, tmp_path)
    assert_close(outputs(fresh), outputs(model), 1e-6)


@settings(max_examples=25)
@given(
    where=st.sets(st.sampled_from(["emb", "conv1", "conv", "one", "fc", "block.fc"]), min_size=1),
    rank=st.integers(1, 3),
    alpha=st.one_of(st.integers(1, 9), st.floats(0.1, 9)),
    ranks=st.dictionaries(st.sampled_from(["fc", "^fc", "conv.?", "block"]), st.integers(1, 4), max_size=2),
    alphas=st.dictionaries(st.sampled_from(["fc", "block.fc", "emb", "o.*"]), st.integers(0, 4), max_size=2),
    method=st.sampled_from([{}, {"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}]),
    bias=st.sampled_from(["none", "lora_only", "all"]),
    whole=st.sampled_from([[], ["head"], ["block.norm", "head"]]),
)
@pytest.mark.filterwarnings("ignore:LoRA. .*_pattern has")
def test_any_options_go_to_peft_and_come_back(
    where: set[str],
    rank: int,
    alpha: float,
    ranks: dict[str, int],
    alphas: dict[str, int],
    method: dict[str, bool],
    bias: Any,
    whole: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    whole = [] if bias == "all" else whole
    lora = optx.LoRA(rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, bias=bias, **method)
    model, fresh = plain(), plain()
    handle = attached(model, lora, targets="|".join(sorted(map(re.escape, where))), modules_to_save=whole)
    handle.save(folder)
    assert_close(outputs(in_peft(plain(), folder)), outputs(model))
    again = optx.attach(fresh, folder)
    assert torch.equal(outputs(fresh), outputs(model))
    assert again.injection == lora
    again.save(folder / "again")
    first, second = tensors_in(folder), tensors_in(folder / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    assert config_in(folder) == config_in(folder / "again")


def test_long_lists_of_modules_are_exact_too(tmp_path: Path) -> None:
    """From twenty on, PEFT shortens a list to suffixes that it finds itself."""
    model = llama(num_hidden_layers=4)
    handle = attached(model, optx.LoRA(rank=1), targets=r".*[0-2]\.(self_attn|mlp)\..*_proj|.*3\..*q_proj")
    handle.save(tmp_path)
    assert len(config_in(tmp_path)["target_modules"]) == 22
    adapted = in_peft(llama(num_hidden_layers=4), tmp_path)
    found = {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found == {one.path for one in handle.served}
    assert_close(outputs(adapted), outputs(model))


@pytest.mark.parametrize("case", ["llama", "llama rslora", "llama dora", "gpt2", "ia3 llama"])
def test_files_hold_the_adapters_tensors_and_nothing_else(case: str, tmp_path: Path) -> None:
    _, _, handle = made(case, tmp_path)
    keys = list(tensors_in(tmp_path))
    per_module = 3 if "dora" in case else 1 if "ia3" in case else 2
    assert len(keys) == per_module * len(handle)
    assert all(key.startswith(PREFIX) and "default" not in key and "optx" not in key for key in keys)
    assert {key.removeprefix(PREFIX) for key in keys} == set(handle.state_dict())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own affair
def test_peft_finds_nothing_in_our_config_to_warn_of(tmp_path: Path) -> None:
    make, _, _ = made("llama ranks", tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(make(), tmp_path)  # warnings are errors here
    assert isinstance(adapted, peft.PeftModelForCausalLM)
    assert config.task_type == "CAUSAL_LM"
    assert config.rank_pattern == {r"^model\.layers\.0\.self_attn\.q_proj": 5}
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    assert config.target_modules == set(names)


def test_a_bare_prefix_free_file_is_what_peft_would_ignore(tmp_path: Path) -> None:
    """The silent failure that the error below is there for."""
    make, _, _ = made("llama", tmp_path)
    rewrite(tmp_path, {k.removeprefix(PREFIX): t for k, t in tensors_in(tmp_path).items()})
    assert torch.equal(outputs(in_peft(make(), tmp_path)), outputs(make()))
    with pytest.raises(optx.FileError, match=r"'model.layers.0.self_attn.q_proj.lora_A.weight'; keys must"):
        optx.attach(make(), tmp_path)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "alpha": 8, "rslora": True}, 4.0),
        ({"rank": 2, "alpha": 3}, 1.5),
        ({"rank": 2, "alpha": 8, "rslora": True, "alpha_pattern": {"fc": 1.0}}, 0.7071),
    ],
)
def test_scale_is_pefts(options: dict[str, Any], scale: float, tmp_path: Path) -> None:
    model = plain()
    handle = optx.attach(model, optx.LoRA(**options), targets="fc")
    handle.save(tmp_path)
    theirs: Any = in_peft(plain(), tmp_path).base_model.model.fc.scaling["default"]
    assert handle.served[0].part.scale == pytest.approx(scale, abs=1e-4)
    assert handle.served[0].part.scale == theirs


# ---- what PEFT can't say ----------------------------------------------------------------------------


class Odd(nn.Module):
    """Paths that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.xhead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv = nn.Conv1d(1, 2, 3, padding=2, dilation=2)
        self.mirror = nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        y = self.xhead(self.head(self.fc(x)))
        return y + self.conv(y[:, None]).sum(1) + self.mirror(y[:, None]).sum(1)


@pytest.mark.parametrize(
    ("injection", "more", "why"),
    [
        (optx.LoRA(rank=1), {"targets": "fc", "modules_to_save": ["head"]}, "train 'xhead' whole too"),
        (optx.LoRA(rank=1), {"targets": "conv"}, "no dilation and no padding mode, and 'conv' has"),
        (optx.LoRA(rank=1), {"targets": "mirror"}, "no dilation and no padding mode, and 'mirror' has"),
        (optx.IA3(), {"targets": "conv"}, "does not serve nn.Conv1d, and 'conv' is one"),
    ],
    ids=["suffix of another", "dilation", "padding mode", "ia3 conv1d"],
)
def test_what_peft_would_do_otherwise_is_not_written_for_it(
    injection: optx.Injection, more: dict[str, Any], why: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 4)
    start = copy.deepcopy(model)
    handle = attached(model, injection, **more)
    with pytest.warns(UserWarning, match=rf"PEFT can't read this adapter, as .*{re.escape(why)}"):
        handle.save(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"optx_adapter.safetensors", "README.md"}
    optx.attach(start, tmp_path)
    assert torch.equal(outputs(start, x), outputs(model, x))


def test_a_tied_head_that_is_trained_whole_is_not_pefts(tmp_path: Path) -> None:
    """Here both are trained; PEFT would untie them."""
    model = llama(tie_word_embeddings=True)
    handle = attached(model, optx.LoRA(rank=2), modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match=r"it would untie 'lm_head' from 'model.embed_tokens.weight'"):
        handle.save(tmp_path)
    fresh = llama(tie_word_embeddings=True)
    optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


def test_a_path_that_ends_another_is_exact_in_peft(tmp_path: Path) -> None:
    handle = optx.attach(plain(), optx.LoRA(rank=1, rank_pattern={"^fc": 2}), targets="fc|head")
    handle.save(tmp_path)
    assert config_in(tmp_path)["target_modules"] == "fc|head"
    assert config_in(tmp_path)["rank_pattern"] in ({"^fc": 2}, {"^head": 1})
    adapted = in_peft(plain(), tmp_path).base_model
    assert [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")] == ["model.fc", "model.head"]


def test_a_frozen_head_keeps_peft_from_training_it(tmp_path: Path) -> None:
    """With the task's name, PEFT would ask for the head's weights in the file."""
    optx.attach(bert(), optx.LoRA(rank=2), modules_to_save=()).save(tmp_path / "frozen")
    optx.attach(bert(), optx.LoRA(rank=2)).save(tmp_path / "trained")
    assert config_in(tmp_path / "frozen")["task_type"] is None
    assert config_in(tmp_path / "trained")["task_type"] == "SEQ_CLS"
