"""LoRA, rsLoRA and DoRA beside PEFT: outputs, gradients and merged weights are its own."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from adapter_models import assert_close, attached, ids, in_peft, llama, outputs, peft_talk, plain

import optx

BF16, F32 = torch.bfloat16, torch.float32
LORAS = {
    "lora": optx.LoRA(rank=2, dropout=0.4),
    "rslora": optx.LoRA(rank=2, rslora=True, dropout=0.4),
    "lora_bias": optx.LoRA(rank=2, lora_bias=True, dropout=0.4),
    "dora": optx.LoRA(rank=2, dora=True),
    "dora with dropout": optx.LoRA(rank=2, dora=True, dropout=0.4),
}
TOGETHER = r"conv|one|fc|block\.fc"
PLACES = ["fc", "conv", "conv1", "emb", TOGETHER]
# PEFT has no lora_bias for embeddings, and warns where there is no bias to merge it into.
ASKED = [
    (case, place)
    for case in LORAS
    for place in PLACES
    if case != "lora_bias" or place not in ("emb", TOGETHER)
]


@pytest.mark.parametrize(("case", "targets"), ASKED)
def test_outputs_and_gradients_in_training_are_pefts(case: str, targets: str, tmp_path: Path) -> None:
    """From the same seed, with the same dropout."""
    model = plain()
    handle = attached(model, LORAS[case], targets=targets)
    handle.save(tmp_path)
    with peft_talk():
        other = peft.PeftModel.from_pretrained(plain(), tmp_path, is_trainable=True)
    results = []
    for one in (model.train(), other.train()):
        torch.manual_seed(5)
        out = one(ids())
        out.square().sum().backward()
        results.append(out.detach())
    assert_close(*results, 1e-6)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in other.named_parameters()
        if p.requires_grad
    }
    for one in handle.served:
        suffixes = one.part.suffixes()
        for name, p in one.part.named_parameters():
            key = f"{one.path}.{suffixes[name]}"
            grad = theirs[f"{key}.weight" if name == "magnitude" else key]
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_merging_into_half_precision_is_as_exact_as_pefts(
    dora: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama().to(dtype)
    start = copy.deepcopy(model)
    handle = attached(model, optx.LoRA(rank=4, dora=dora), targets=r".*_proj")
    handle.save(tmp_path)
    exact = copy.deepcopy(start).double()
    again = optx.attach(exact, tmp_path)
    again.merge_and_unload()
    with peft_talk():
        other = in_peft(copy.deepcopy(start), tmp_path).merge_and_unload()
    handle.merge_and_unload()
    ours = theirs = worst = 0.0
    for key, wanted in exact.state_dict().items():
        mine = (model.state_dict()[key].double() - wanted).abs()
        ours += float(mine.sum())
        theirs += float((other.state_dict()[key].double() - wanted).abs().sum())
        half_a_step = wanted.abs() * torch.finfo(dtype).eps / 2
        worst = max(worst, float((mine - half_a_step).max()))
    assert ours <= theirs * (1 + 1e-6)  # a tie, where sums in float32 meet a halfway point
    assert worst < 1e-6  # rounded once: no number is further off than half a step


def test_unmerging_is_exact_where_subtracting_is_not() -> None:
    for dtype in (F32, BF16):
        model = llama().to(dtype)
        start = {k: t.clone() for k, t in model.state_dict().items()}
        handle = attached(model, optx.LoRA(rank=4), targets=r".*_proj")
        handle.merge()
        naive = sum(
            int(
                (
                    one.module.weight - one.part.scale * one.part.B @ one.part.A
                    != start[f"{one.path}.weight"]
                ).sum()
            )  # type: ignore[operator]
            for one in handle.served
        )
        assert naive > 100
        handle.unmerge()
        handle.remove()
        assert all(torch.equal(t, start[k]) for k, t in model.state_dict().items())


def test_a_tied_head_merges_alone_or_not_at_all(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    kept = embedding.detach().clone()
    handle = attached(model, optx.LoRA(rank=2), targets="lm_head")
    wanted = outputs(model)
    with pytest.raises(
        optx.MergeError, match=r"lm_head.weight is tied: model.embed_tokens.weight, lm_head.weight"
    ):
        handle.merge()
    assert torch.equal(outputs(model), wanted)
    handle.merge(untie=True)
    assert_close(outputs(model), wanted)
    assert torch.equal(embedding, kept)
    handle.unmerge()
    assert model.lm_head.weight is embedding
    assert torch.equal(outputs(model), wanted)
