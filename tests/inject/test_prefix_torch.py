"""Prefixes and adapters of heads in torch's own attention: nn.MultiheadAttention and what is built of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import assert_close, only, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import gated, moved
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.inject._attention import Attention, multi_head_attention

F64 = torch.float64


@settings(max_examples=40)
@given(data=st.data())
def test_torchs_module_computes_the_same(data: st.DataObject) -> None:
    """With an adapter of zeros, nn.MultiheadAttention gives what it gives alone, for all its options."""
    flag = st.booleans()
    kinds = {"bias": data.draw(flag), "batch_first": data.draw(flag)}
    if data.draw(flag):
        kinds |= {"kdim": 6, "vdim": 3}
    torch.manual_seed(data.draw(st.integers(0, 99)))
    attn = nn.MultiheadAttention(8, 2, dtype=F64, **kinds).eval()
    batched, same = data.draw(flag), "kdim" not in kinds and data.draw(flag)
    n, rows, columns = 3 if batched else 1, 4, 4 if same else 5

    def draw(length: int, width: int) -> Tensor:
        shape = (n, length, width) if kinds["batch_first"] else (length, n, width)
        return torch.randn(*(shape if batched else (length, width)), dtype=F64)

    query = draw(rows, 8)
    key, value = (
        (query, query) if same else (draw(columns, kinds.get("kdim", 8)), draw(columns, kinds.get("vdim", 8)))
    )
    options: dict[str, Any] = {"need_weights": data.draw(flag), "average_attn_weights": data.draw(flag)}
    if data.draw(flag):
        each = data.draw(flag) and batched
        mask = torch.rand(*((n * 2,) if each else ()), rows, columns) < 0.4
        mask[..., 0] = False
        options["attn_mask"] = mask if data.draw(flag) else torch.randn(mask.shape, dtype=F64)
    if data.draw(flag):
        padding = torch.rand(*((n, columns) if batched else (columns,))) < 0.4
        padding[..., 0] = False
        if options.get("attn_mask", padding).dtype == torch.bool:
            options["key_padding_mask"] = padding
    with torch.set_grad_enabled(data.draw(flag)):
        wanted, shares = attn(query, key, value, **options)
        with optx.attach(nn.ModuleDict({"a": attn}), optx.MultiHeadParallelAdapter(rank=2), "a") as handle:
            got, weights = attn(query, key, value, **options)
            assert_close(got, wanted, 1e-12)
            assert (weights is None) == (shares is None)
            if shares is not None:
                assert_close(weights, shares, 1e-12)
            shake(handle.parameters(), by=0.5)
            assert not torch.allclose(attn(query, key, value, **options)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("per_head", [True, False])
def test_torchs_function_with_boolean_masks(per_head: bool) -> None:
    """True hides there; the module makes numbers of its masks before, other callers may not."""
    torch.manual_seed(0)
    x, out = torch.randn(4, 3, 8, dtype=F64), torch.randn(8, 8, dtype=F64)
    packed = torch.randn(24, 8, dtype=F64), torch.randn(24, dtype=F64)
    mask = torch.rand(*((6,) if per_head else ()), 4, 4) < 0.4
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]).bool()
    mask[..., 0] = False
    masks = {"attn_mask": mask, "key_padding_mask": padding}
    arguments = (x, x, x, 8, 2, *packed, None, None, False, 0.0, out, None)
    wanted, shares = F.multi_head_attention_forward(*arguments, **masks)
    got, weights = multi_head_attention(*arguments, **masks)
    assert_close(got, wanted, 1e-12)
    assert weights is not None
    assert_close(weights, shares, 1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_torchs_encoder_layer_does_not_go_past_it(grad: bool) -> None:
    """In eval mode without gradients, nn.TransformerEncoderLayer has a path that calls no module."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        before = layer(x)
        handle = moved(layer, optx.PrefixTuning(length=2), "self_attn")
        part = only(handle)
        attn = layer.self_attn
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2)
            for t in F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        )
        heads, _ = gated(Attention(q, k, v), part.key, part.value)
        u = layer.norm1(x + attn.out_proj(heads.transpose(1, 2).flatten(2)))
        assert_close(layer(x), layer.norm2(u + layer.linear2(layer.linear1(u).relu())), 1e-5)
        handle.remove()
        assert torch.equal(layer(x), before)


def test_stacked_on_torchs_module() -> None:
    attn = nn.MultiheadAttention(8, 2, dtype=F64).eval()
    model, x = nn.ModuleDict({"a": attn}), torch.randn(5, 3, 8, dtype=F64)
    methods = [optx.PrefixTuning(length=2), optx.MultiHeadParallelAdapter(rank=2, init="bert")]
    results = []
    for order in (methods, methods[::-1]):
        torch.manual_seed(1)
        handles = {m.name: optx.attach(model, m, "a") for m in order}
        for name in sorted(handles):
            shake(handles[name].parameters(), by=0.5)
            with torch.no_grad():
                only(handles[name]).key.copy_(torch.linspace(-1, 1, 16).view(2, 2, 4))
                only(handles[name]).value.copy_(torch.linspace(1, -2, 16).view(2, 2, 4))
        results.append(attn(x, x, x)[0])
        for handle in handles.values():
            handle.remove()
    assert_close(results[0], results[1], 1e-12)


def test_biases_of_torchs_module_are_refused() -> None:
    for kind in ("add_bias_kv", "add_zero_attn"):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, **{kind: True})})
        with pytest.raises(optx.TargetError, match="'a' has add_bias_kv or add_zero_attn"):
            optx.attach(model, optx.PrefixTuning(), "a")
