"""Prefix tuning and adapters of attention's heads: the laws of arXiv 2110.04366, section 3.1."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import adapter_models
import pytest
import torch
from adapter_models import assert_close, bert, cache_name, gpt2, ids, llama, only, outputs, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack  # type: ignore[attr-defined]

import optx
from optx.inject._attention import Attention, multi_head_attention, with_prefix
from optx.inject._heads import Prefix

F64 = torch.float64
DTYPES = [torch.float32, F64]
moved = functools.partial(adapter_models.moved, by=0.5)


def modes() -> int:
    return len(_get_current_function_mode_stack())


# ---- the identity ----------------------------------------------------------------------------------------


def gated(call: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - λ) Attention(q, K, V) + λ Attention(q, P_k, P_v), and λ, from the definitions."""
    heads = call.query.shape[-3]
    K, V, P, W = (
        t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (call.key, call.value, key, value)
    )
    factor = 1 / math.sqrt(call.query.shape[-1]) if call.scale is None else call.scale
    logits = call.query @ K.transpose(-1, -2) * factor
    if call.is_causal:
        rows, columns = logits.shape[-2:]
        hidden = torch.arange(columns)[None] > torch.arange(rows)[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    if call.attn_mask is not None:
        mask = call.attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    own = call.query @ P.transpose(-1, -2) * factor
    sums = own.exp().sum(-1), logits.exp().sum(-1)
    share = (sums[0] / (sums[0] + sums[1]))[..., None]
    return (1 - share) * (logits.softmax(-1) @ V) + share * (own.softmax(-1) @ W), share


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


# ---- in models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_a_cache_that_was_there_before(kv_heads: int) -> None:
    """Independent: transformers' own cache, filled with the prefix; positions of real tokens unmoved."""
    from transformers import DynamicCache

    model = llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads)
    bare = copy.deepcopy(model)
    handle = moved(model, optx.PrefixTuning(length=5))
    cache = DynamicCache(config=bare.config)
    for index, one in enumerate(handle.served):
        part: Any = one.part
        pair = (t.detach()[None].expand(2, -1, -1, -1).clone() for t in (part.key, part.value))
        cache.update(*pair, index)
    x = ids()
    with torch.no_grad():
        wanted = bare(
            x,
            position_ids=torch.arange(7)[None],
            attention_mask=torch.ones(2, 12),
            **{cache_name(bare): cache},
        )
    assert_close(outputs(model), wanted.logits, 1e-5)
    assert not torch.allclose(outputs(model), outputs(bare), atol=1e-2)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("injection", [optx.PrefixTuning(length=3), optx.MultiHeadParallelAdapter(rank=3)])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache_equals_generation_without(make: Any, injection: Any, padded: bool) -> None:
    """Left padding brings a mask, and with it transformers' packed queries at each new token."""
    model = make()
    bare = copy.deepcopy(model)
    moved(model, injection)
    x = ids()
    mask = torch.ones_like(x)
    if padded:
        mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    cached, plain = (model.generate(x, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert_close(a, b, 1e-5)
    assert not torch.equal(bare.generate(x, **options).logits[0], plain.logits[0])


def test_padding_stays_unseen() -> None:
    """A padded batch gives what its rows give alone, whatever the padding is."""
    model = bert("BertModel")
    moved(model, optx.PrefixTuning(length=3))
    moved(model, optx.MultiHeadParallelAdapter(rank=2))
    x = ids()
    mask = torch.ones_like(x)
    mask[1, 4:] = 0
    with torch.no_grad():
        both = model(x, attention_mask=mask).last_hidden_state
        alone = model(x[1:, :4]).last_hidden_state
        x[1, 4:] = 11
        again = model(x, attention_mask=mask).last_hidden_state
    assert_close(both[1, :4], alone[0], 1e-5)
    assert torch.equal(both[1, :4], again[1, :4])


def test_causal_models_stay_causal() -> None:
    for make in (llama, gpt2):
        model = make()
        moved(model, optx.PrefixTuning(length=3))
        x, y = ids(), ids()
        y[:, 5:] = 3
        assert_close(outputs(model, x)[:, :5], outputs(model, y)[:, :5], 1e-6)
        assert not torch.allclose(outputs(model, x)[:, 5:], outputs(model, y)[:, 5:], atol=1e-2)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    names = ("encoder", "decoder")
    sizes = {
        f"{n}_{what}": k
        for n in names
        for what, k in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    config = BartConfig(vocab_size=64, d_model=16, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes)
    return BartForConditionalGeneration(config)


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=24))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=64, word_embed_proj_dim=16, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes
    )
    return OPTForCausalLM(config)


@pytest.mark.parametrize(("make", "count"), [(t5, 6), (bart, 3), (distilbert, 2), (opt, 2)])
def test_other_families(make: Any, count: int) -> None:
    """Self- and cross-attention, each with a prefix of its own; position biases; queries scaled before."""
    torch.manual_seed(0)
    model = make().eval()
    x = {"input_ids": ids()}
    if model.config.is_encoder_decoder:
        x["decoder_input_ids"] = ids()[:, :4]
    before = model(**x)[0]
    handle = optx.attach(model, optx.MultiHeadParallelAdapter(rank=2))
    if not model._supports_sdpa:  # T5 in transformers 4: an attention of its own
        with pytest.raises(optx.TargetError, match="did not reach torch's scaled_dot_product_attention"):
            model(**x)
        return
    assert torch.equal(model(**x)[0], before)
    handle.remove()
    handle = moved(model, optx.PrefixTuning(length=3))
    assert len(handle) == count
    out = model(**x)[0]
    assert not torch.allclose(out, before, atol=1e-3)
    out.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in handle.parameters())
    handle.remove()
    assert torch.equal(model(**x)[0], before)


class TimmAttention(nn.Module):
    """As timm's: one qkv projection, and no config that knows the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = 2, 4, True
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_of_ones_own() -> None:
    model = nn.Sequential(TimmAttention())
    x = torch.randn(3, 5, 8)
    before = model(x)
    with moved(model, optx.PrefixTuning(length=2), "0") as handle:
        assert only(handle).key.shape == (2, 2, 4)
        assert not torch.allclose(model(x), before, atol=1e-3)
    model[0].fused_attn = False
    with pytest.raises(optx.TargetError, match=r"'0' has fused_attn=False"):
        optx.attach(model, optx.PrefixTuning(), "0")


# ---- torch's own module ----------------------------------------------------------------------------------


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


# ---- stacking, failing, leaving --------------------------------------------------------------------------

STACK = {
    "prefix": lambda: optx.PrefixTuning(length=2),
    "long": lambda: optx.PrefixTuning(length=5),
    "heads": lambda: optx.MultiHeadParallelAdapter(rank=2, init="bert"),
    "ffn": lambda: optx.ScaledParallelAdapter(rank=2, init="bert"),
    "sequential": lambda: optx.SequentialAdapter(rank=2, init="bert"),
    "attention": lambda: optx.ParallelAdapter(rank=2, position="attention", init="bert"),
}


@settings(max_examples=6)
@given(
    on=st.permutations(list(STACK)),
    off=st.permutations(list(STACK)),
    make=st.sampled_from([llama, bert, gpt2]),
)
def test_any_stack_comes_off_in_any_order(on: list[str], off: list[str], make: Any) -> None:
    """What is left acts as if attached alone; at the end nothing is left."""
    model = make()
    before = outputs(model)
    handles = {}
    for name in on:
        handles[name] = optx.attach(model, STACK[name](), name=name)
        shake(handles[name].parameters(), seed=len(name), by=0.3)
    for gone, name in enumerate(off, 1):
        handles[name].remove()
        if gone == 4:
            alone = make()
            for rest in (n for n in on if n in off[4:]):
                handle = optx.attach(alone, STACK[rest](), name=rest)
                handle.load_state_dict(handles[rest].state_dict())
            assert torch.equal(outputs(alone), outputs(model))
    assert torch.equal(outputs(model), before)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "optx" not in module._modules


def test_prefixes_and_heads_commute() -> None:
    results = []
    for order in itertools.permutations(("prefix", "long", "heads")):
        model = llama().double()
        for name in order:
            handle = optx.attach(model, STACK[name](), name=name)
            shake(handle.parameters(), seed=len(name), by=0.3)
            for one in handle.served:
                with torch.no_grad():
                    for p in one.part.parameters():
                        p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p).roll(len(name)))
        results.append(outputs(model))
    for other in results[1:]:
        assert_close(other, results[0], 1e-12)


def test_a_failing_forward_leaves_no_mode() -> None:
    model = llama()
    moved(model, optx.PrefixTuning(length=2))
    moved(model, optx.MultiHeadParallelAdapter(rank=2))
    wanted = outputs(model)

    def fail(*_: Any) -> None:
        assert modes() == 2
        raise RuntimeError("broken")

    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        outputs(model)
    assert modes() == 0
    hook.remove()
    assert torch.equal(outputs(model), wanted)


def test_other_attention_is_not_touched() -> None:
    """Only calls inside the served module see the prefix."""
    model = nn.Sequential(TimmAttention(), TimmAttention())
    moved(model, optx.PrefixTuning(length=2), "0")
    x = torch.randn(2, 3, 8)
    q, k, v = torch.randn(3, 1, 2, 3, 4)
    wanted = F.scaled_dot_product_attention(q, k, v)
    second = model[1](x)
    model(x)
    assert torch.equal(model[1](x), second)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)


def test_another_attention_kernel_is_refused() -> None:
    for name in ("eager", "flex_attention"):
        model = llama(attn_implementation=name)
        with pytest.raises(optx.TargetError, match=rf"self_attn' has attn_implementation='{name}'.*'sdpa'"):
            optx.attach(model, optx.PrefixTuning())
        assert "optx" not in model.model.layers[0].self_attn._modules


def test_a_call_that_does_nothing_is_an_error() -> None:
    """The kernel may change after attaching."""
    model = llama()
    handle = optx.attach(model, optx.PrefixTuning(length=2))
    model.set_attn_implementation("eager")
    with pytest.raises(
        optx.TargetError, match=r"the prefix on 'model.layers.0.self_attn' \(LlamaAttention\) did no"
    ):
        outputs(model)
    assert modes() == 0
    handle.disable()
    outputs(model)


@pytest.mark.parametrize(
    ("make", "options", "targets", "message"),
    [
        (llama, {}, r".*\.mlp", r"mlp' is a LlamaMLP and does not say how many heads it has"),
        (llama, {}, r".*\.q_proj", r"q_proj' is a Linear and does not say how many heads"),
        (bert, {}, r".*\.attention", r"'bert.encoder.layer.0.attention' is a BertAttention and does not say"),
        (
            bert,
            {"kv_heads": 2, "head_dim": 8},
            r".*\.attention(\.self)?",
            r"attention.self' is inside '.*act twice",
        ),
        (bert, {"kv_heads": 2}, r".*\.pooler", r"head_dim="),
    ],
)
def test_modules_without_heads(make: Any, options: dict[str, Any], targets: str, message: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, optx.PrefixTuning(**options), targets)
    assert list(model.state_dict()) == keys


def test_biases_of_torchs_module_are_refused() -> None:
    for kind in ("add_bias_kv", "add_zero_attn"):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, **{kind: True})})
        with pytest.raises(optx.TargetError, match="'a' has add_bias_kv or add_zero_attn"):
            optx.attach(model, optx.PrefixTuning(), "a")


def test_heads_that_were_given_wrongly() -> None:
    model = llama()
    optx.attach(model, optx.PrefixTuning(length=2, kv_heads=3, head_dim=4))
    with pytest.raises(optx.ShapeError, match=r"3 heads of width 4, .* with keys of shape \(2, \d, 7, 8\)"):
        outputs(model)


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
