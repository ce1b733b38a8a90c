"""Prefixes and adapters of heads inside models: caches, padding, stacks, what they can't serve."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from adapter_models import assert_close, bert, cache_name, gpt2, ids, llama, only, outputs, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import modes, moved
from torch import Tensor, nn
from torch.nn import functional as F

import optx

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
    if not model._supports_sdpa:  # T5 in transformers 4
        with pytest.raises(optx.TargetError, match="computes attention in a way of its own"):
            optx.attach(model, optx.MultiHeadParallelAdapter(rank=2))
        return
    handle = optx.attach(model, optx.MultiHeadParallelAdapter(rank=2))
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


def test_heads_that_were_given_wrongly() -> None:
    model = llama()
    optx.attach(model, optx.PrefixTuning(length=2, kv_heads=3, head_dim=4))
    with pytest.raises(optx.ShapeError, match=r"3 heads of width 4, .* with keys of shape \(2, \d, 7, 8\)"):
        outputs(model)
