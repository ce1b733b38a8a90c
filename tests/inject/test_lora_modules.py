"""LoRA on modules with ways of their own, and on those that it can't serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import assert_close, attached, bert, ids, in_peft, outputs, plain, shake
from torch import nn

import optx

BF16, F32 = torch.bfloat16, torch.float32


# ---- modules with ways of their own -----------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_that_scale_their_rows(dora: bool, tmp_path: Path) -> None:
    """Gemma multiplies embeddings by sqrt(d); so must the update be, as merging it would."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5))

    model, x = make(), torch.arange(9)
    base = outputs(model, x)
    handle = attached(model, optx.LoRA(rank=2, dora=dora), targets="0")
    handle.save(tmp_path)
    wanted = outputs(model, x)
    assert (wanted - base).abs().max() > 0.1
    if hasattr(peft.tuners.lora.Embedding, "_get_embed_scale"):  # PEFT 0.17 does not scale the update
        assert_close(outputs(in_peft(make(), tmp_path), x), wanted)
    handle.merge()
    assert_close(outputs(model, x), wanted)


def test_embeddings_keep_their_precision_under_autocast() -> None:
    model = nn.Sequential(nn.Embedding(9, 6))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    x = torch.arange(9)
    with torch.autocast("cpu", BF16):
        assert torch.equal(model(x), model[0].weight)  # type: ignore[arg-type]
    shake(handle.parameters())
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == F32


@pytest.mark.parametrize("rank", [2, 4])
def test_grouped_convolutions_are_pefts(rank: int, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    model, x = make(), torch.randn(2, 4, 5, 5)
    handle = attached(model, optx.LoRA(rank=rank), targets="0")
    handle.save(tmp_path)
    assert_close(outputs(in_peft(make(), tmp_path), x), outputs(model, x))
    before = model[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(optx.MergeError, match=r"convolution with groups=2 mixes channels"):
        handle.merge()
    assert torch.equal(model[0].weight, before)  # type: ignore[arg-type]


def test_biases_are_trained_as_differences() -> None:
    model = bert()
    start = {k: t.clone() for k, t in model.state_dict().items()}
    handle = optx.attach(model, optx.LoRA(rank=2, bias="all"), modules_to_save=())
    biases = [k for k in start if k.endswith(".bias")]
    shifts = [k for k in handle.state_dict() if k.endswith(("lora_bias_delta", "bitfit.delta"))]
    assert {k.removesuffix(".bias") for k in biases} == {
        k.removesuffix(".lora_bias_delta").removesuffix(".bitfit.delta") for k in shifts
    }
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    outputs_before = outputs(model)
    model(ids()).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), outputs_before)
    handle.merge()
    assert all(not torch.equal(model.state_dict()[k], start[k]) for k in biases if "key" not in k)
    handle.remove()
    assert all(torch.equal(t, start[k]) for k, t in model.state_dict().items())


def test_all_biases_are_the_models_not_another_adapters() -> None:
    model = plain()
    optx.attach(model, optx.LoRA(rank=1, lora_bias=True), targets="fc", name="below")
    handle = optx.attach(model, optx.LoRA(rank=1, bias="all"), targets="fc")
    assert {one.path for one in handle.served} == {"conv1", "conv", "fc", "block.fc", "block.norm", "head"}


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank is 0; it must be at least 1"),
        ({"rank": 2.5}, r"rank is 2.5; it must be a whole number"),
        ({"rank": "8"}, r"rank is '8'"),
        ({"alpha": -1}, r"alpha is -1"),
        ({"dropout": 1.5}, r"dropout is 1.5; it must be between 0 and 1"),
        ({"bias": "some"}, r"bias is 'some'; it must be 'none', 'lora_only' or 'all'"),
        ({"dora": True, "lora_bias": True}, r"dora=True and lora_bias=True don't go together"),
        ({"rank_pattern": {"fc": 0}}, r"rank_pattern\['fc'\] is 0"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has '\(', not a regular expression"),
        ({"alpha_pattern": {"fc": -2}}, r"alpha_pattern\['fc'\] is -2"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        optx.LoRA(**options)


def learned_positions() -> nn.Module:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    return OPTLearnedPositionalEmbedding(8, 4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(4, 3), {"rank": 4}, r"rank=4 is larger than the weight of '0', \(3, 4\)"),
        (lambda: nn.LayerNorm(4), {"rank": 1}, r"LoRA serves Linear, .*'0' is a LayerNorm"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), {"rank": 1}, r"Embedding with max_norm"),
        (
            learned_positions,
            {"rank": 1},
            r"LearnedPositionalEmbedding that looks up rows in a way of its own",
        ),
        (lambda: nn.Embedding(4, 4), {"rank": 1, "lora_bias": True}, r"lora_bias=True is not for embeddings"),
        (lambda: nn.Conv1d(4, 4, 1, groups=2), {"rank": 3}, r"groups=2; LoRA's rank=3 must be a multiple"),
        (lambda: nn.Conv1d(4, 4, 1, groups=2), {"rank": 2, "dora": True}, r"groups=2; DoRA has no norm"),
    ],
)
def test_modules_it_cannot_serve(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(make())
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, optx.LoRA(**options), targets="0")
    assert "optx" not in dict(model[0].named_children())


def test_a_rank_above_the_matrix_must_name_the_module() -> None:
    """PEFT's files have such ranks, where one rank is for all."""
    model = nn.Sequential(nn.Linear(4, 3))
    handle = optx.attach(model, optx.LoRA(rank=1, rank_pattern={"^0": 5}), targets="0")
    assert handle.served[0].part.A.shape == (5, 4)


def test_a_pattern_that_names_nothing_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"rank_pattern has 'q_prj', which matches none of the served modules"
    ):
        optx.attach(plain(), optx.LoRA(rank=1, rank_pattern={"q_prj": 2}), targets="fc")
