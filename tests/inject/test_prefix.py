"""Prefix tuning and adapters of attention's heads: the laws of arXiv 2110.04366, section 3.1."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapter_models import assert_close, bert, ids, llama, only, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import gated, moved
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.inject._attention import Attention, with_prefix
from optx.inject._heads import Prefix

F64 = torch.float64
DTYPES = [torch.float32, F64]


@st.composite
def calls(draw: st.DrawFn) -> tuple[Attention, Tensor, Tensor]:
    batch, kv, width, wide = (draw(st.integers(1, 3)) for _ in range(4))
    groups, rows, columns, length = (draw(st.integers(1, 4)) for _ in range(4))
    dtype, kind = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(["none", "causal", "bool", "added", "short"])),
    )
    # The three ways in which transformers hands over grouped queries.
    how = draw(st.sampled_from(["repeated", "gqa", "packed"]))
    torch.manual_seed(draw(st.integers(0, 999)))
    rows = 1 if how == "packed" else rows
    query = torch.randn(batch, kv * groups, rows, width, dtype=dtype)
    key = torch.randn(batch, kv, columns, width, dtype=dtype)
    value = torch.randn(batch, kv, columns, wide, dtype=dtype)
    heads = kv * groups
    if how == "packed":
        query, heads, rows = query.view(batch, kv, groups, width), kv, groups
    if how == "repeated":
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask: Tensor | None = None
    if kind in ("bool", "added", "short"):
        visible = torch.rand(batch, draw(st.sampled_from([1, heads])), rows, columns) < 0.6
        visible[..., 0] = True
        mask = (
            visible
            if kind == "bool"
            else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
        )
        if kind == "short":  # one that broadcasts over the keys
            mask = torch.randn(batch, 1, rows, 1, dtype=dtype)
    causal = kind == "causal" and how != "packed"
    scale = draw(st.sampled_from([None, 0.7]))
    call = Attention(query, key, value, mask, 0.0, causal, scale, how == "gqa")
    prefix = torch.randn(kv, length, width, dtype=dtype), torch.randn(kv, length, wide, dtype=dtype)
    return call, *prefix


@settings(max_examples=120)
@given(calls())
def test_a_prefix_is_a_gated_sum(drawn: tuple[Attention, Tensor, Tensor]) -> None:
    """Law 1, with and without masks, for every way in which heads are grouped."""
    call, key, value = drawn
    wanted, _ = gated(call, key, value)
    assert_close(with_prefix(call, key, value), wanted, 1e-12 if key.dtype == F64 else 3e-6)


@settings(max_examples=50)
@given(calls())
def test_a_prefix_of_zeros_takes_its_share(drawn: tuple[Attention, Tensor, Tensor]) -> None:
    """Law 2: λ = l / (l + sum of exp), and the output shrinks by 1 - λ."""
    call, key, value = drawn
    zeros = torch.zeros_like(key), torch.zeros_like(value)
    _, share = gated(call, *zeros)
    tolerance = 1e-12 if key.dtype == F64 else 3e-6
    assert_close(with_prefix(call, *zeros), (1 - share) * call.run(), tolerance)
    length = key.shape[1]
    if call.attn_mask is None and not call.is_causal:
        K = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        factor = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        total = (call.query @ K.transpose(-1, -2) * factor).exp().sum(-1, keepdim=True)
        assert_close(share, length / (length + total), tolerance)


@settings(max_examples=50)
@given(calls())
def test_no_prefix_and_one_that_nobody_looks_at(drawn: tuple[Attention, Tensor, Tensor]) -> None:
    """Law 3: l = 0, and P_k q towards minus infinity, give the original."""
    call, key, value = drawn
    query = call.query.clone()
    query[..., 0] = 1.0
    call, key = call._replace(query=query), torch.zeros_like(key)
    tolerance = 1e-12 if key.dtype == F64 else 3e-6
    assert_close(with_prefix(call, key[:, :0], value[:, :0]), call.run(), tolerance)
    key[..., 0] = -1e6
    assert_close(with_prefix(call, key, value), call.run(), tolerance)


def test_the_prefix_of_a_whole_model_is_the_gated_sum() -> None:
    """BERT's attention in float64, with a padding mask, against the definition."""
    attention = bert("BertModel").double().encoder.layer[0].attention.self
    x = torch.randn(2, 5, 16, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None].expand(2, 1, 5, 5)
    q, k, v = (
        getattr(attention, name)(x).view(2, 5, 2, 8).transpose(1, 2) for name in ("query", "key", "value")
    )
    part = only(moved(nn.ModuleDict({"attn": attention}), optx.PrefixTuning(length=3), "attn"))
    wanted, _ = gated(Attention(q, k, v, mask), part.key, part.value)
    assert_close(attention(x, mask)[0], wanted.transpose(1, 2).flatten(2), 1e-12)


# ---- adapters of the heads -------------------------------------------------------------------------------


def test_one_head_is_a_parallel_adapter() -> None:
    """Law 8: W_down = W_q P_k' / sqrt(d); BERT's queries have a bias, which goes into b_down."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(num_attention_heads=1, initializer_range=0.3, **sizes)).double().eval()
    other = copy.deepcopy(model)
    head = only(moved(model, optx.MultiHeadParallelAdapter(rank=3)))
    flat = only(moved(other, optx.ParallelAdapter(rank=3, position="attention")))
    query = model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        flat.W_down.copy_(head.key[0] @ query.weight / math.sqrt(8))
        flat.b_down.copy_(head.key[0] @ query.bias / math.sqrt(8))
        flat.W_up.copy_(head.value[0].t())
        flat.b_up.zero_()
    x = ids() % 9
    assert_close(outputs(model, x), outputs(other, x), 1e-12)


@settings(max_examples=60)
@given(
    drawn=calls(),
    form=st.sampled_from(["relu", "gelu", "silu", "tanh", "linear", "softmax"]),
    scale=st.sampled_from(["learned", 0.5, 3.0]),
)
def test_heads_plus_their_adapters(drawn: tuple[Attention, Tensor, Tensor], form: Any, scale: Any) -> None:
    """out + s f(q P_k' factor) P_v, P_k and P_v shared by the queries of a group."""
    call, key, value = drawn
    kv, rank, width = key.shape
    call = call._replace(value=torch.randn_like(call.key))
    value = torch.randn_like(key)
    delta = optx.HiddenDelta(
        form, "heads", compose="scaled", rank=rank, scale=scale, kv_heads=kv, head_dim=width
    )
    part: Any = delta.part(nn.Module(), "attn")
    with torch.no_grad():
        part.key, part.value = nn.Parameter(key), nn.Parameter(value)
        if scale == "learned":
            part.scale.fill_(1.75)
    groups = call.query.shape[1] // kv
    P, W = (t.repeat_interleave(groups, dim=0) for t in (key, value))
    factor = width**-0.5 if call.scale is None else call.scale
    f: Any = {"tanh": torch.tanh, "linear": lambda z: z, "softmax": lambda z: z.softmax(-1)}.get(form)
    f = f or getattr(F, form)
    wanted = call.run() + (1.75 if scale == "learned" else scale) * (
        f(call.query @ P.transpose(1, 2) * factor) @ W
    )
    assert_close(part.attend(call), wanted, 1e-11 if key.dtype == F64 else 1e-4)


# ---- the MLP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", [optx.PrefixTuning(length=3, mlp=5), optx.MAM(prefix=3, rank=2, mlp=5)])
def test_folding_the_mlp_changes_no_output(injection: optx.Injection) -> None:
    model = llama()
    handle = moved(model, injection)
    wanted = outputs(model)
    names = {name.rsplit(".", 1)[1] for name, _ in handle.named_parameters() if ".prefix." in name}
    assert names == {"embedding", "W_down", "b_down", "W_up", "b_up"}
    optx.fold_prefix(handle)
    assert torch.equal(outputs(model), wanted)
    prefixes = [one.part for one in handle.served if isinstance(one.part, Prefix)]
    assert [tuple(p.shape) for part in prefixes for p in part.parameters()] == [(1, 3, 8)] * 4
    assert all(getattr(one.injection, "mlp", None) is None for one in handle.served)
    # From here on it is a handle of the plain method, whose file another process loads.
    plain = type(injection).from_options({**injection.options(), "mlp": None})
    assert handle.injection == plain
    fresh = llama()
    again = optx.attach(fresh, plain)
    again.load_state_dict(handle.state_dict())
    assert torch.equal(outputs(fresh), wanted)
    with pytest.raises(optx.OptxError, match=r"fold_prefix: .* has no prefix that is made by an MLP"):
        optx.fold_prefix(handle)
    handle.remove()
    with pytest.raises(optx.OptxError, match="fold_prefix: this handle has been removed"):
        optx.fold_prefix(handle)


def test_the_mlp_is_the_formula_and_trains() -> None:
    model = llama()
    handle = moved(model, optx.PrefixTuning(length=3, mlp=5))
    part: Any = handle.served[0].part
    key, value = part.pair()
    made = torch.tanh(part.embedding @ part.W_down.t() + part.b_down) @ part.W_up.t() + part.b_up
    for row in range(3):
        assert_close(torch.cat([key[:, row].flatten(), value[:, row].flatten()]), made[row], 1e-6)
    model(ids()).logits.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in handle.parameters())


def test_starts() -> None:
    """Normal with deviation 0.02, or what was asked for; adapters of heads start as the identity."""
    model = llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    for std in (0.02, 0.5):
        with optx.attach(model, optx.PrefixTuning(length=64, std=std)) as handle:
            drawn = torch.cat([p.detach().flatten() for p in handle.parameters()])
            assert float(drawn.std()) == pytest.approx(std, rel=0.05)
            assert abs(float(drawn.mean())) < 0.05 * std
    with optx.attach(model, optx.MultiHeadParallelAdapter()) as handle:
        for one in handle.served:
            part: Any = one.part
            assert float(part.value.detach().abs().max()) == 0
            assert float(part.key.detach().abs().max()) == pytest.approx(32**-0.5, rel=0.05)
