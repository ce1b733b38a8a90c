"""`Handle.param_groups`: LoRA+'s groups are PEFT's, and other methods have groups too."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from adapter_models import bert, ids, llama, peft_talk, plain
from expert_models import BOTH, ONE_PARAMETER, moe
from peft.optimizers import create_loraplus_optimizer

import optx
from optx import LoRA

CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], list[str]]] = {
    "plain": (llama, {}, {}, ["q_proj", "down_proj"]),
    "dora": (llama, {"use_dora": True}, {"dora": True}, ["q_proj", "embed_tokens"]),
    "convolutions": (plain, {"use_dora": True}, {"dora": True}, ["conv", "fc", "emb"]),
    "biases": (bert, {"bias": "all"}, {"bias": "all"}, ["query", "value"]),
    "biases of B": (
        bert,
        {"lora_bias": True, "bias": "lora_only"},
        {"lora_bias": True, "bias": "lora_only"},
        ["query"],
    ),
    "head": (bert, {"task_type": "SEQ_CLS"}, {}, ["query"]),
}


def shapes(groups: list[dict[str, Any]]) -> dict[tuple[float, float], list[tuple[int, ...]]]:
    """Sorted shapes by rate and decay; PEFT keeps empty groups, and two of one rate apart."""
    found: dict[tuple[float, float], list[tuple[int, ...]]] = {}
    for group in groups:
        key = (group["lr"], group["weight_decay"])
        found.setdefault(key, []).extend(tuple(p.shape) for p in group["params"])
    return {key: sorted(value) for key, value in found.items() if value}


@ONE_PARAMETER
@pytest.mark.parametrize("targets", [["q_proj"], []])
def test_the_factors_of_experts_are_pefts_too(targets: list[str]) -> None:
    options: dict[str, Any] = {"target_modules": targets, "target_parameters": BOTH}
    with peft_talk():
        model = peft.get_peft_model(moe(), peft.LoraConfig(r=2, **options))
        wanted = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    handle = optx.attach(moe(), LoRA(rank=2), [*targets, *BOTH])
    assert shapes(handle.param_groups(lr=1e-3, ratio=16)) == shapes(wanted.param_groups)


@pytest.mark.parametrize("case", CASES)
def test_groups_are_pefts(case: str) -> None:
    make, theirs, ours, targets = CASES[case]
    with peft_talk():
        model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=targets, **theirs))
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        )
    whole = ["classifier"] if case == "head" else []
    if case == "head":  # PEFT trains a copy of the classifier, of the same shapes
        assert "modules_to_save.default" in " ".join(
            n for n, p in model.named_parameters() if p.requires_grad
        )
    handle = optx.attach(make(), LoRA(rank=2, **ours), targets, modules_to_save=whole)
    groups = handle.param_groups(lr=1e-3, ratio=16, weight_decay=0.1)
    wanted, made = shapes(optimizer.param_groups), shapes(groups)
    assert made == wanted
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in handle.parameters())


def test_an_optimizer_takes_them() -> None:
    model = llama()
    handle = optx.attach(model, LoRA(rank=2), ["q_proj", "embed_tokens"])
    groups = handle.param_groups(lr=1e-3, ratio=4, embedding_lr=0.5)
    assert {group["lr"] for group in groups} == {1e-3, 4e-3, 0.5}
    opt = optx.wrap(torch.optim.AdamW(groups), optx.PerpGrad())
    model(ids()).logits.square().sum().backward()
    before = [p.detach().clone() for p in handle.parameters()]
    opt.step()
    assert all(
        not torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True) if p.grad.any()
    )


@pytest.mark.parametrize(
    "injection", [LoRA(rank=2), optx.IA3(), optx.SVFit(rank=2), optx.MAM(prefix=2, rank=2), optx.BitFit()]
)
def test_every_injection_has_groups(injection: optx.Injection) -> None:
    """Matrices decay; vectors and single numbers, to which 0 means something else, don't."""
    handle = optx.attach(bert(), injection, modules_to_save=())
    groups = handle.param_groups(lr=0.5, weight_decay=0.25)
    assert all(group["lr"] == 0.5 for group in groups)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.25) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(handle.parameters())
    if not isinstance(injection, LoRA):
        with pytest.raises(
            optx.OptxError, match=rf"ratio=16 is LoRA\+'s, .* is of {type(injection).__name__}"
        ):
            handle.param_groups(lr=0.5, ratio=16)


def test_numbers_out_of_range() -> None:
    handle = optx.attach(llama(), LoRA(rank=2))
    for options, why in (
        ({"lr": -1}, "lr is -1"),
        ({"lr": 1, "ratio": 0.5}, r"ratio is 0\.5; it must be at least 1"),
        ({"lr": 1, "weight_decay": -1}, "weight_decay is -1"),
        ({"lr": 1, "embedding_lr": -1}, "embedding_lr is -1"),
    ):
        with pytest.raises(optx.OptxError, match=f"param_groups: {why}"):
            handle.param_groups(**options)  # type: ignore[arg-type]


def test_a_models_parameters_are_not_given() -> None:
    with pytest.raises(optx.OptxError, match="param_groups: params is 3; parameters are the model's"):
        optx.param_groups(torch.nn.Linear(2, 2), lr=1.0, params=3)


def test_without_a_ratio_embeddings_have_the_rate_of_all() -> None:
    handle = optx.attach(llama(), LoRA(rank=2), ["q_proj", "embed_tokens"])
    assert {group["lr"] for group in handle.param_groups(lr=1e-3)} == {1e-3}


def test_no_norm_that_is_trained_whole_decays() -> None:
    """PEFT's way: of what has one dimension, biases and torch's LayerNorm are left out."""
    handle = optx.attach(bert(), LoRA(rank=2), ["query"], modules_to_save=["bert.embeddings.LayerNorm"])
    norm = {id(p) for p in handle.saved[0].module.parameters()}
    groups = handle.param_groups(lr=1e-3, ratio=16, weight_decay=0.1)
    assert {g["weight_decay"] for g in groups for p in g["params"] if id(p) in norm} == {0.0}
