"""Adapters on hidden vectors: the laws of the unified view (arXiv 2110.04366) on small real models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_methods import METHODS, run
from adapter_models import assert_close, bert, gpt2, llama, moved, only, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optx

F64 = torch.float64


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **sizes)).eval()


@pytest.mark.parametrize("make", [bert, gpt2, vit])
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_the_start_and_after_removal(make: Callable[[], Any], method: str) -> None:
    """Law 4: bit for bit; the others say that they are none, and are none."""
    model, (injection, identity) = make(), METHODS[method]
    before = run(model)
    split = make is vit and not hasattr(
        model, "layers"
    )  # transformers 4: no one module is the feed-forward part
    if split and method in ("parallel", "scaled", "scaled both", "bert start"):
        with pytest.raises(
            optx.TargetError, match=r"ViTModel is a ViT \(transformers 4\) model\. Pass targets="
        ):
            optx.attach(model, injection())
        return
    handle = optx.attach(model, injection())
    assert torch.equal(run(model), before) == identity
    shake(handle.parameters())
    assert not torch.allclose(run(model), before, atol=1e-4)
    handle.remove()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_linear_form_is_lora(make: Callable[[], Any]) -> None:
    """Law 5: parallel, without biases, s = alpha / r; merged too."""
    rows = optx.HiddenDelta("linear", "projections", compose="scaled", rank=3, scale=5 / 3, bias=False)
    model, other = make().double(), make().double()
    handle, lora = moved(model, rows), moved(other, optx.LoRA(rank=3, alpha=5))
    assert [one.path for one in handle.served] == [one.path for one in lora.served]
    for one, two in zip(handle.served, lora.served, strict=True):
        one.part.W_down.data.copy_(two.part.A)
        one.part.W_up.data.copy_(two.part.B)
    wanted = run(other)
    assert_close(run(model), wanted, 1e-12)
    weights = copy.deepcopy(model.state_dict())
    handle.merge()
    lora.merge()
    for one, two in zip(handle.served, lora.served, strict=True):
        assert_close(one.module.weight, two.module.weight, 1e-14)
    assert_close(run(model), wanted, 1e-12)
    handle.unmerge()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_linear_forms_with_biases_merge(make: Callable[[], Any], insertion: Any) -> None:
    model = make()
    delta = optx.HiddenDelta(
        "linear", "projections", insertion, "scaled", rank=3, scale="learned", dropout=0.1
    )
    handle = moved(model, delta)
    wanted = run(model)
    handle.merge()
    assert_close(run(model), wanted)
    handle.unmerge()
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bert start"])
def test_other_forms_do_not_merge(method: str) -> None:
    model = llama()
    handle = moved(model, METHODS[method][0]())
    wanted = run(model)
    with pytest.raises(optx.MergeError, match=r"merge: \w+ at 'model\.layers\.0.*can't be merged"):
        handle.merge()
    assert torch.equal(run(model), wanted)


@settings(max_examples=15)
@given(scale=st.floats(0.25, 4), seed=st.integers(0, 99))
def test_the_scale_comes_last(scale: float, seed: int) -> None:
    """Law 6: s A is A with s W_up and s b_u; gradients of W_up and b_u differ by s."""
    torch.manual_seed(seed)
    scaled, plain = (nn.Linear(5, 4, dtype=F64) for _ in range(2))
    plain.load_state_dict(scaled.state_dict())
    one = only(moved(nn.Sequential(scaled), optx.ScaledParallelAdapter(rank=3, scale=scale), "0"))
    two = only(moved(nn.Sequential(plain), optx.ParallelAdapter(rank=3), "0"))
    with torch.no_grad():
        for p, q in zip(two.parameters(), one.parameters(), strict=True):
            p.copy_(q)
        two.W_up.mul_(scale)
        two.b_up.mul_(scale)
    x, weight = torch.randn(7, 5, dtype=F64), torch.randn(7, 4, dtype=F64)
    for module in (scaled, plain):
        (module(x) * weight).sum().backward()
    assert_close(scaled(x), plain(x), 1e-12)
    assert_close(one.W_up.grad, scale * two.W_up.grad, 1e-12)
    assert_close(one.b_up.grad, scale * two.b_up.grad, 1e-12)
    assert_close(one.W_down.grad, two.W_down.grad, 1e-12)


def test_numbers_trained_per_layer() -> None:
    """Law 7, at d = 768, r = l = 16."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=9))

    def trained(injection: optx.Injection) -> list[int]:
        with optx.attach(model, injection) as handle:
            return [row.trainable for row in handle.report().rows]

    assert trained(optx.ScaledParallelAdapter(rank=16)) == [25_360]
    assert trained(optx.SequentialAdapter(rank=16)) == [25_360, 25_360]
    assert trained(optx.PrefixTuning(length=16)) == [24_576]
    assert trained(optx.MultiHeadParallelAdapter(rank=16)) == [24_576]
    assert trained(optx.MAM(prefix=16, rank=16)) == [24_576, 25_360]
