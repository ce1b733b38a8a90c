"""SVFit and FLoRA as LoRA folders: PEFT reads them and computes the same, and so does optx."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

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
    plain,
    tensors_in,
)
from torch import nn

import optx

CASES: dict[str, tuple[Any, optx.Injection, Any]] = {
    "SVFit": (llama, optx.SVFit(), None),
    "SVFit, some values": (llama, optx.SVFit(rank=3), r".*_proj"),
    "SVFit, ranks of their own": (llama, optx.SVFit(energy=0.7), r".*_proj"),
    "SVFit, BERT": (bert, optx.SVFit(rank=4), None),
    "SVFit, Conv1D": (gpt2, optx.SVFit(), None),
    "SVFit, all kinds": (plain, optx.SVFit(), "emb|conv|one|fc|block.fc"),
    "FLoRA": (llama, optx.FLoRA(rank=3, scale=0.5), None),
    "FLoRA, in < out": (llama, optx.FLoRA(in_rank=2, out_rank=4), None),
    "FLoRA, Conv1D": (gpt2, optx.FLoRA(in_rank=5, out_rank=3), None),
    "FLoRA, all kinds": (plain, optx.FLoRA(rank=3, in_rank=1), "emb|conv|one|fc|block.fc"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_and_optx_compute_the_same_from_it(case: str, tmp_path: Path) -> None:
    build, injection, targets = CASES[case]
    model = build()
    before = outputs(model)
    handle = attached(model, injection, targets=targets)
    tuned = outputs(model)
    assert (tuned - before).abs().max() > 5e-3
    state, hooks = torch.get_rng_state(), len(model._forward_pre_hooks)
    optx.export_lora(handle, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs(model), tuned)  # which is left as it was
    assert len(model._forward_pre_hooks) == hooks
    theirs = in_peft(build(), tmp_path)
    assert_close(outputs(theirs), tuned)
    assert_close(outputs(theirs.merge_and_unload()), tuned)
    fresh = build()
    again = optx.attach(fresh, tmp_path)
    assert isinstance(again.injection, optx.LoRA)
    assert_close(outputs(fresh), tuned)
    handle.merge()
    assert_close(outputs(model), tuned)


def test_singular_values_after_peft_merged_are_the_trained_ones(tmp_path: Path) -> None:
    model = llama()
    handle = attached(model, optx.SVFit(), targets=r".*q_proj")
    optx.export_lora(handle, tmp_path)
    merged = in_peft(llama(), tmp_path).merge_and_unload()
    for one in handle.served:
        part: Any = one.part
        values = torch.linalg.svdvals(merged.get_submodule(one.path).weight.detach())
        wanted = part.sigma.detach().abs().sort(descending=True).values
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)


def test_each_module_has_its_own_rank_and_no_scale(tmp_path: Path) -> None:
    model = llama()
    handle = attached(model, optx.SVFit(energy=0.7), targets=r".*_proj")
    optx.export_lora(handle, tmp_path)
    tensors = tensors_in(tmp_path)
    for one in handle.served:
        A = tensors[f"base_model.model.{one.path}.lora_A.weight"]
        assert len(A) == len(next(iter(one.part.parameters())))
    assert len({len(A) for key, A in tensors.items() if "lora_A" in key}) > 1
    config = config_in(tmp_path)
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_half_precision(tmp_path: Path) -> None:
    model = llama().bfloat16()
    handle = attached(model, optx.SVFit())
    optx.export_lora(handle, tmp_path)
    theirs = in_peft(llama().bfloat16(), tmp_path)
    gap = (outputs(theirs) - outputs(model)).abs().max() / outputs(model).abs().max()
    assert gap < 0.03


def test_a_module_trained_whole_goes_along(tmp_path: Path) -> None:
    model = bert()
    handle = attached(model, optx.FLoRA(rank=2), modules_to_save=["classifier"])
    tuned = outputs(model)
    optx.export_lora(handle, tmp_path)
    assert_close(outputs(in_peft(bert(), tmp_path)), tuned)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))


def dilated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2))


@pytest.mark.parametrize(
    ("build", "injection", "message"),
    [
        (grouped, optx.SVFit(), r"export_lora: '0' has 2 groups"),
        (dilated, optx.FLoRA(rank=2), r"export_lora: PEFT can't read .* dilation .* '0'"),
        (dilated, optx.BitFit(), r"export_lora: BitFit at '0' is not a LoRA"),
        (dilated, optx.LoRA(rank=2), r"LoRA at '0' .* handle\.save\(path\)"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    build: Any, injection: optx.Injection, message: str, tmp_path: Path
) -> None:
    model = build()
    keys = copy.deepcopy(list(model.state_dict()))
    handle = optx.attach(model, injection, targets="0")
    with pytest.raises(optx.OptxError, match=message):
        optx.export_lora(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    handle.remove()
    assert list(model.state_dict()) == keys
    with pytest.raises(optx.OptxError, match="removed"):
        optx.export_lora(handle, tmp_path / "out")
