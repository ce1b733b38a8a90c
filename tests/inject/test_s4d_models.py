"""`optx.S4D` in real models: in the place of attention and beside it, with padding, caches and beams."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from injections import assert_same, bert, llama, move, snapshot, tokens
from torch import Tensor, nn

import optx

SMALL: dict[str, Any] = {"d_state": 8, "dt_min": 0.05, "dt_max": 0.5}


def attached(model: nn.Module, targets: Any = None, **options: Any) -> optx.Handle:
    torch.manual_seed(2)
    handle = optx.attach(model, optx.S4D(**{**SMALL, **options}), targets)
    move(handle)
    return handle


@pytest.fixture(scope="module")
def decoder() -> Any:
    model = llama()
    attached(model)
    return model


@pytest.fixture(scope="module")
def aside() -> Any:
    model = llama()
    attached(model, mode="beside")
    return model


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def cache_of(output: Any) -> Any:
    """A model's cache, by the name that this version of transformers has for it."""
    return getattr(output, "cache", None) or output.past_key_values


def going_on(output: Any) -> dict[str, Any]:
    """The argument of a call that goes on from another."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    named = "cache" in inspect.signature(LlamaAttention.forward).parameters
    return {"cache" if named else "past_key_values": cache_of(output)}


# ---- in place and beside ---------------------------------------------------------------------------------


def test_it_computes_in_the_place_of_attention_and_goes_without_a_trace() -> None:
    model = llama()
    before, plain = snapshot(model), model(tokens()).logits
    handle = optx.attach(model, optx.S4D(**SMALL))
    layer = model.model.layers[0].self_attn.optx.s4d.layer
    assert isinstance(layer, optx.S4DLayer)
    assert not layer.bidirectional
    assert not model.model.layers[0].self_attn.q_proj.weight.requires_grad
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention = model.model.layers[0].self_attn
    norm = model.model.layers[0].input_layernorm
    changed = model(tokens()).logits
    hook.remove()
    x = norm(seen[0])
    assert torch.equal(attention(x)[0], layer(x))
    assert attention(x)[1] is None
    assert not torch.allclose(changed, plain, atol=1e-3)
    with handle.disable():
        assert torch.equal(model(tokens()).logits, plain)
    with pytest.raises(optx.MergeError):
        handle.merge()
    handle.remove()
    assert_same(model, before)
    assert torch.equal(model(tokens()).logits, plain)


@pytest.mark.parametrize("output", ["glu", "linear", "none"])
def test_beside_nothing_changes_at_first_and_all_of_it_learns(output: str) -> None:
    model = llama(layers=1)
    plain = model(tokens()).logits
    handle = optx.attach(model, optx.S4D(mode="beside", output=output, **SMALL))
    assert torch.equal(model(tokens()).logits, plain)
    opt = torch.optim.SGD(handle.parameters(), lr=1.0)
    for _ in range(2):
        opt.zero_grad()
        model(tokens()).logits.square().mean().backward()
        opt.step()
    for name, p in handle.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert not torch.allclose(model(tokens()).logits, plain, atol=1e-5)


def test_an_encoder_s_is_bidirectional_and_a_decoder_s_causal(decoder: Any) -> None:
    x = tokens()
    later = x.clone()
    later[:, 5] = 9
    assert torch.allclose(decoder(x).logits[:, :5], decoder(later).logits[:, :5], atol=1e-5)
    model = bert()
    handle = attached(model)
    assert len(handle) == 2
    hidden, other = (model.bert(one).last_hidden_state for one in (x, later))
    assert (hidden - other)[:, 0].abs().max() > 1e-4
    assert [one.part.note() for one in handle.served] == ["legs, N = 8, both ways"] * 2


def test_torch_s_encoder_does_not_go_past_it() -> None:
    model, x = encoder(), torch.randn(3, 9, 8)
    with pytest.raises(
        optx.TargetError, match=r"does not say whether .* Pass optx.S4D\(bidirectional=True\)"
    ):
        attached(model)
    plain = model(x)
    attached(model, bidirectional=True)
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[0, 6:] = True
    with torch.no_grad():
        assert not torch.allclose(model(x), plain, atol=1e-2)
        found = model(x, src_key_padding_mask=padding)
        assert torch.allclose(found[:1, :6], model(x[:1, :6]), atol=1e-5)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    with pytest.raises(optx.OptxError, match="bidirectional=False"):
        model(x, mask=causal)
    forward = encoder()
    attached(forward, bidirectional=False)
    assert torch.equal(forward(x, mask=causal, is_causal=True), forward(x))
    with pytest.raises(optx.OptxError, match="need_weights=True asks for attention weights"):
        forward.layers[0].self_attn(x, x, x, need_weights=True)
    first = nn.MultiheadAttention(8, 2)  # L before batch
    attached(nn.Sequential(first), "0", bidirectional=True)
    turned = first(*[x.transpose(0, 1)] * 3)
    assert turned[1] is None
    assert torch.allclose(turned[0].transpose(0, 1), first.optx.s4d.layer(x), atol=1e-6)


# ---- padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["decoder", "bert", "eager"])
def test_padding_leaves_no_trace(kind: str, side: str) -> None:
    model: Any = bert() if kind == "bert" else llama()
    if kind == "eager":
        model.set_attn_implementation("eager")
    attached(model)
    x = tokens()
    real = torch.ones(2, 7, dtype=torch.long)
    at, kept = (slice(0, 3), slice(3, 7)) if side == "left" else (slice(4, 7), slice(0, 4))
    real[0, at] = 0
    positions = (real.cumsum(1) - 1).clamp_min(0)
    run = model.bert if kind == "bert" else model.model
    with torch.no_grad():
        found = run(x, attention_mask=real, position_ids=positions).last_hidden_state
        alone = run(x[:1, kept]).last_hidden_state
        other = run(x[1:]).last_hidden_state
    assert torch.allclose(found[:1, kept], alone, atol=1e-5)
    assert torch.allclose(found[1:], other, atol=1e-5)


def test_masks_that_hide_more_are_refused(decoder: Any) -> None:
    x = tokens()
    packed = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    packed[..., 4:, :4] = False
    with pytest.raises(optx.OptxError, match=r"'model.layers.0.self_attn'.* not padding alone"):
        decoder(x, attention_mask=packed)
    with pytest.raises(optx.OptxError, match="output_attentions=True"):
        decoder.model.layers[0].self_attn(
            torch.randn(1, 3, 16), position_embeddings=None, output_attentions=True
        )
    with pytest.raises(optx.ShapeError, match="width of 16"):
        decoder.model.layers[0].self_attn(torch.randn(1, 3, 8), position_embeddings=None)


# ---- generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["decoder", "aside"])
def test_a_cache_goes_on_as_without(way: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(way)
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :2] = 0  # on the left
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": mask}
    for more in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found = model.generate(x, do_sample=False, **options, **more)
        plain = model.generate(x, do_sample=False, use_cache=False, **options, **more)
        assert torch.equal(found, plain)
    with torch.no_grad():  # in pieces, of several tokens too
        first = model(x[:, :3], use_cache=True)
        second = model(x[:, 3:6], **going_on(first))
        third = model(x[:, 6:], **going_on(second))
        whole = model(x).logits
    pieces = torch.cat([first.logits, second.logits, third.logits], 1)
    assert torch.allclose(pieces, whole, atol=1e-5)
    assert cache_of(third).get_seq_length() == 7


@pytest.mark.parametrize("way", ["decoder", "aside"])
def test_a_copy_of_a_cache_goes_on_by_itself_and_has_no_copy_of_the_mixer(
    way: str, request: pytest.FixtureRequest
) -> None:
    """As transformers reuses the cache of a prompt; the state is computed when the copy is made."""
    model, x = request.getfixturevalue(way), tokens()
    with torch.no_grad():
        first = model(x[:, :4], use_cache=True)
        copied = copy.deepcopy(first)
        held = [value for layer in cache_of(copied).layers for value in vars(layer).values()]
        assert not any(isinstance(value, (tuple, nn.Module)) for value in held)
        ends = [model(x[:, 4:], **going_on(one)).logits for one in (copied, first)]
        assert torch.equal(ends[0], ends[1])
        assert torch.allclose(ends[0], model(x).logits[:, 4:], atol=1e-5)


@pytest.mark.parametrize("way", ["decoder", "aside"])
def test_caches_that_can_not_keep_a_state_are_refused(way: str, request: pytest.FixtureRequest) -> None:
    model, x = request.getfixturevalue(way), tokens()
    with pytest.raises(optx.OptxError, match="StaticLayer"):
        model.generate(x, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    parts = [layer.self_attn.optx.s4d for layer in model.model.layers]
    with torch.no_grad():
        for part in parts:
            part.enabled = False
        filled = model(x, use_cache=True)
        for part in parts:
            part.enabled = True
        with pytest.raises(optx.OptxError, match="has 7 tokens, of which the mixer has seen 0"):
            model(x[:, :1], **going_on(filled))
        own = model(x, use_cache=True)
    with pytest.raises(optx.OptxError, match="can't go back"):
        cache_of(copy.deepcopy(own)).crop(-2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 7] = 0
    with pytest.raises(optx.OptxError, match="padding behind tokens"):
        model(x[:, :2], **going_on(copy.deepcopy(own)), attention_mask=mask)


def test_a_module_that_does_not_say_its_number_is_refused_with_a_cache(decoder: Any) -> None:
    attention = decoder.model.layers[0].self_attn
    number, x = attention.layer_idx, torch.randn(1, 3, 16)
    cache = going_on(decoder(tokens(), use_cache=True))
    try:
        del attention.layer_idx
        with pytest.raises(optx.OptxError, match="does not say which of its layers"):
            attention(x, position_embeddings=None, **cache)
    finally:
        attention.layer_idx = number
    with pytest.raises(optx.OptxError, match="a cache of type int"):
        attention(x, position_embeddings=None, **dict.fromkeys(cache, 3))


def test_both_ways_there_is_nothing_to_cache() -> None:
    model: Any = llama(layers=1)
    attached(model, bidirectional=True)
    assert model(tokens(), attention_mask=torch.ones(2, 1, 7, 7).bool(), use_cache=False).logits.shape[1] == 7
    with pytest.raises(optx.OptxError, match="both ways has no state"):
        model(tokens(), attention_mask=torch.ones(2, 1, 7, 7).bool(), use_cache=True)


# ---- attach ----------------------------------------------------------------------------------------------


def test_what_can_not_be_served_is_refused_at_attach() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.is_causal = nn.Linear(4, 4), nn.Linear(4, 4), False

    class Bias(Cross):
        def forward(self, x: Tensor, position_bias: Any = None) -> Tensor:
            return x

    class Bare(nn.Module):
        is_causal = True

        def forward(self, x: Tensor) -> Tensor:
            return x

    for module, name, options, words in (
        (nn.Linear(4, 4), "attn", {}, r"S4D serves self-attention modules; 'attn' is a Linear\.$"),
        (nn.LayerNorm(4), "attn", {"bidirectional": True}, "'attn' is a LayerNorm"),
        (Cross(), "encoder_attn", {}, "'encoder_attn' .* is cross-attention"),
        (Bias(), "attn", {}, "hands a position bias on"),
        (Bare(), "attn", {}, r"no linear module that shows the width.*S4D\(width=\.\.\.\)"),
    ):
        model = nn.ModuleDict({name: module})
        with pytest.raises(optx.TargetError, match=words):
            attached(model, name, **options)
        assert not hasattr(module, "optx")
    model = llama(layers=1)
    lora = optx.attach(model, optx.LoRA(rank=2))
    with pytest.raises(optx.TargetError, match=r"something is attached to 'model\.layers\.0\.self_attn'"):
        attached(model)
    lora.remove()
    attached(model)
    with pytest.raises(optx.TargetError, match="in whose place"):
        optx.attach(model, optx.LoRA(rank=2))


def test_cross_attention_is_left_alone_by_default_and_refused_in_a_call() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    handle = attached(model, bidirectional=False)
    assert [one.path for one in handle.served] == ["layers.0.self_attn"]
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    assert model(x, memory).shape == x.shape
    attention = model.layers[0].self_attn
    with pytest.raises(optx.TargetError, match="key= of another sequence"):
        attention(x, memory, memory)


# ---- optimizers ------------------------------------------------------------------------------------------


def test_its_steps_have_a_rate_of_their_own_wherever_groups_are_made() -> None:
    model = nn.Sequential(encoder())
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    handle = attached(model, bidirectional=True)
    slow = {p for name, p in handle.named_parameters() if name.endswith(("log_dt", "log_A_real", "A_imag"))}
    assert len(slow) == 6
    by_handle = torch.optim.AdamW(handle.param_groups(lr=0.01, weight_decay=0.1))
    by_model = torch.optim.AdamW(optx.param_groups(model, lr=0.01, weight_decay=0.1))
    plain = [list(group["params"]) for group in opt.param_groups]
    followed = optx.wrap(opt, handle)
    for one in (by_handle, by_model, followed):
        found = {p: (g["lr"], g["weight_decay"]) for g in one.param_groups for p in g["params"]}
        assert {found[p] for p in slow} == {(1e-3, 0.0)}
        assert (1e-3, 0.0) not in {found[p] for p in found if p not in slow}
        assert set(handle.parameters()) <= set(found)
    assert {p for g in followed.param_groups for p in g["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }
    model(torch.randn(2, 5, 8)).square().mean().backward()
    followed.step()
    handle.remove()
    assert [list(group["params"]) for group in followed.param_groups] == plain
