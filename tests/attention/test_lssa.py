"""`optx.LSSA` and `optx.LSSAR` on models: equal to loops in transformers' registry, caches, masks, remove."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import CACHE, TOKENS, bert_classes, built, logits, loops_in_registry, padded
from injections import assert_same, checkpoint_layers, snapshot
from reference.softplus_attention import weights as by_loops
from torch import Tensor, nn
from torch.nn import functional as F

import optx

LSSAR3 = optx.LSSAR(p=3)


def registry() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def assert_same_numbers(found: Tensor, wanted: Tensor) -> None:
    """softmax's nan of rows that see nothing, too."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["llama", "window", "gpt2", "bert", "bart"])
def test_logits_are_those_of_loops(kind: str) -> None:
    """GQA, a window, padding on the left, both directions and a decoder that looks at an encoder."""
    power = 15.0 if kind == "llama" else 3.0
    injection: Any = optx.LSSA() if kind == "gpt2" else optx.LSSAR(p=power)
    for inputs in ({"input_ids": TOKENS}, padded()):
        with loops_in_registry(None if kind == "gpt2" else power) as name, torch.no_grad():
            wanted = logits(built(kind, name), **inputs)
        real = inputs.get("attention_mask", torch.ones_like(TOKENS)).bool()
        real = real[:, -wanted.shape[1] :] if kind != "bart" else torch.ones(wanted.shape[:2]).bool()
        for implementation in ("sdpa", "eager"):
            model = built(kind, implementation)
            plain = logits(model, **inputs)
            if kind == "bert" and implementation == "eager" and bert_classes():
                with optx.attach(model, injection), pytest.raises(optx.TargetError, match="='sdpa'"):
                    logits(model, **inputs)
                continue
            with optx.attach(model, injection) as handle, torch.no_grad():
                assert not torch.allclose(plain[real], wanted[real], atol=1e-3)
                torch.testing.assert_close(logits(model, **inputs)[real], wanted[real], rtol=1e-8, atol=1e-8)
                with handle.disable():
                    assert_same_numbers(logits(model, **inputs), plain)
            assert_same_numbers(logits(model, **inputs), plain)


@pytest.mark.parametrize("kind", ["llama", "window", "gpt2"])
def test_generating_with_a_cache_is_generating_without(kind: str) -> None:
    model = built(kind)
    with optx.attach(model, LSSAR3):
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        for inputs in ({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, padded()):
            cached, bare = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
            assert torch.equal(cached, bare)
        whole = logits(model)
        steps, cache = [], None
        for part in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:]):  # in pieces of several
            out = model(part, use_cache=True, **{CACHE: cache})
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)


def test_a_cache_of_fixed_length_counts_what_is_in_it() -> None:
    from transformers import StaticCache

    model = built("llama")
    with optx.attach(model, LSSAR3), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        parts = [model(part, **{CACHE: cache}).logits for part in (TOKENS[:, :4], TOKENS[:, 4:5])]
        torch.testing.assert_close(torch.cat(parts, 1), logits(model)[:, :5], rtol=1e-9, atol=1e-9)


def test_packed_sequences_see_only_themselves() -> None:
    model = built("llama")
    with optx.attach(model, LSSAR3), torch.no_grad():
        alone = [model(TOKENS[:1, i : i + 3]).logits for i in (0, 3)]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
        packed = model(TOKENS[:1], position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


def test_eager_attention_gives_weights_and_sdpa_says_why_not() -> None:
    model = built("llama", "eager")
    with optx.attach(model, LSSAR3), torch.no_grad():
        shares = model(TOKENS, output_attentions=True).attentions
    assert len(shares) == 2
    assert shares[0].shape == (2, 4, 6, 6)
    torch.testing.assert_close(shares[1].sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    assert (shares[0][..., 5, :] == 0).any()  # of softmax none is
    part = optx.attach(built("llama"), LSSAR3).served[0]
    module: Any = part.module
    q = torch.randn(1, 4, 3, 4)
    with pytest.raises(optx.OptxError, match="loaded with attn_implementation='eager'"):
        registry()["optx"](module, q, q, q, None, output_attentions=True)
    with pytest.raises(optx.TargetError, match="a LlamaAttention, caps its scores"):
        registry()["optx"](module, q, q, q, None, softcap=50.0)
    with pytest.raises(optx.TargetError, match="a mask of 2 axes"):
        registry()["optx"](module, q, q, q, torch.ones(1, 3))


# ---- life --------------------------------------------------------------------------------------------


def test_remove_leaves_no_trace_in_model_config_or_registry() -> None:
    model = built("llama")
    before, names, plain = snapshot(model), dict(registry()), logits(model)
    configs = [layer.self_attn.config for layer in model.model.layers]
    said = model.config.to_dict()
    handle = optx.attach(model, LSSAR3)
    assert list(model.state_dict()) == list(built("llama").state_dict())
    assert model.config.to_dict() == said
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[0].self_attn.config.to_dict() == said
    handle.remove()
    assert all(layer.self_attn.config is one for layer, one in zip(model.model.layers, configs, strict=True))
    assert dict(registry()) == names
    assert_same(model, before)
    assert torch.equal(logits(model), plain)


def test_only_what_is_targeted_is_served() -> None:
    model = built("llama")
    plain = logits(model)
    with optx.attach(model, LSSAR3, layers=1) as handle:
        assert [one.path for one in handle.served] == ["model.layers.1.self_attn"]
        one = logits(model)
    with optx.attach(model, LSSAR3):
        both = logits(model)
    assert not torch.allclose(one, plain)
    assert not torch.allclose(one, both)


def test_copies_and_pickles_are_served_too_and_on_their_own() -> None:
    model = built("llama")
    handle = optx.attach(model, LSSAR3)
    served = logits(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.remove()
    for one in copies:
        assert one.model.layers[0].self_attn.config.optx_own is one.config
        assert torch.equal(logits(one), served)
    del copies, one
    assert "optx" not in registry()


def test_training_and_evaluation_have_powers_of_their_own_and_set_changes_both(tmp_path: Path) -> None:
    model = built("llama")
    alone = {}
    for p in (None, 3, 15, 5):
        with optx.attach(model, optx.LSSA() if p is None else optx.LSSAR(p=p)):
            alone[p] = logits(model)
    handle = optx.attach(model, optx.LSSAR(train_p=0, eval_p=3))
    assert torch.equal(logits(model), alone[3])
    assert torch.equal(logits(model.train()), alone[None])
    handle.save(tmp_path / "before")
    handle.set(p=5)
    assert torch.equal(logits(model), alone[5])
    assert torch.equal(logits(model.eval()), alone[5])
    assert handle.report().rows[0].note == "p=5"
    handle.save(tmp_path / "after")
    handle.remove()
    again = optx.attach(model, tmp_path / "after")
    assert again.injection == optx.LSSAR(p=5)
    assert torch.equal(logits(model), alone[5])
    again.remove()
    again = optx.attach(model, tmp_path / "before")
    assert torch.equal(logits(model), alone[3])
    again.set(train_p=3)
    assert again.injection == optx.LSSAR(train_p=3, eval_p=3)
    assert torch.equal(logits(model.train()), alone[3])
    for wrong in (0, -1, float("nan"), True):
        with pytest.raises(optx.OptxError, match=f"LSSAR: p is {wrong}; it must be"):
            again.set(p=wrong)  # type: ignore[attr-defined]
    with pytest.raises(
        optx.OptxError, match=r"LSSAR: train_p is 'a'; it must be .* or 0 for no re-weighting"
    ):
        again.set(train_p="a")  # type: ignore[attr-defined]
    with pytest.raises(optx.OptxError, match="set: no power is given"):
        again.set()  # type: ignore[attr-defined]
    assert torch.equal(logits(model), alone[3])
    again.remove()
    model.eval()
    with pytest.raises(optx.OptxError, match="LSSA has no power"):
        optx.attach(model, optx.LSSA()).set(p=3)


def test_it_is_no_change_of_weights() -> None:
    handle = optx.attach(built("bert"), LSSAR3)
    with pytest.raises(optx.MergeError, match="is not a change of the module's weights"):
        handle.merge()
    assert handle.state_dict() == {}


def test_checkpointed_layers_have_the_same_gradients_under_dropout() -> None:
    found = []
    for checkpointed in (False, True):
        model = built("llama", attention_dropout=0.3)
        optx.attach(model, LSSAR3)
        if checkpointed:
            checkpoint_layers(model)
        torch.manual_seed(1)
        logits(
            model.train(), input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)
        ).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", pytest.param("encoder", marks=pytest.mark.long)])
def test_compile_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    model = built("llama", num_hidden_layers=1) if kind == "llama" else encoder
    call = (lambda m: m(TOKENS).logits) if kind == "llama" else (lambda m: m(x))
    optx.attach(model, LSSAR3)
    eager = call(model)
    eager.square().sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    out = call(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(out, eager)
    out.square().sum().backward()
    for p, one in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, one)


# ---- torch's modules and one's own ----------------------------------------------------------------------


class Own(nn.Module):
    """Attention in the way of timm's and of people's own models."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused_attn = fused
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class Outer(nn.Module):
    """A block with attention in it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.own(x)


def heads_by_loops(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, H, T, d): what attention gives, heads side by side, and its weights."""
    shares = torch.stack(
        [
            torch.stack([by_loops(*pair, one, 3.0) for pair in zip(*b, strict=True)])
            for one, b in zip(seen, zip(q, k, strict=True), strict=True)
        ]
    )
    return (shares @ v).transpose(1, 2).flatten(2), shares


def test_a_model_of_ones_own() -> None:
    model = nn.Sequential(Own()).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with optx.attach(model, LSSAR3):
        found = model(x)
    q, k, v = model[0].qkv(x).detach().view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out, _ = heads_by_loops(q, k, v, torch.ones(2, 5, 5).tril().bool())
    torch.testing.assert_close(found, model[0].proj(out), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_takes_no_way_around(training: bool) -> None:
    """Its fast path, in evaluation without gradients, hands weights to one kernel."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True).double()
    model = nn.TransformerEncoder(layer, 1).train(training)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(training):
        before = model(x, src_key_padding_mask=padding)
        with optx.attach(model, LSSAR3):
            found = model(x, src_key_padding_mask=padding)
        one: Any = model.layers[0]
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2)
            for t in F.linear(x, one.self_attn.in_proj_weight, one.self_attn.in_proj_bias).chunk(3, -1)
        )
        out, _ = heads_by_loops(q, k, v, ~padding[:, None, :].expand(2, 5, 5))
        u = one.norm1(x + one.self_attn.out_proj(out))
        wanted = one.norm2(u + one.linear2(one.linear1(u).relu()))
        torch.testing.assert_close(found[~padding], wanted[~padding], rtol=1e-9, atol=1e-9)
        assert torch.equal(model(x, src_key_padding_mask=padding), before)


@pytest.mark.parametrize("average", [True, False])
def test_torchs_attention_gives_the_weights_that_it_used(average: bool) -> None:
    attention = nn.MultiheadAttention(16, 2, dtype=torch.float64, batch_first=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with optx.attach(nn.ModuleDict({"a": attention}), LSSAR3):
        out, shares = attention(x, x, x, average_attn_weights=average)
        single, one = attention(x[0], x[0], x[0], average_attn_weights=average)
        alone, none = attention(x, x, x, need_weights=False)
    q, k, v = (
        t.unflatten(-1, (2, 8)).transpose(1, 2)
        for t in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    heads, wanted = heads_by_loops(q, k, v, torch.ones(2, 5, 5).bool())
    torch.testing.assert_close(shares, wanted.mean(1) if average else wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out, attention.out_proj(heads), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone, out)
    torch.testing.assert_close(single, out[0])
    torch.testing.assert_close(one, shares[0])
    assert none is None


# ---- what is refused -----------------------------------------------------------------------------------


class Silent(nn.Module):
    """Attention that goes by none of the ways that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


def test_attention_that_cant_be_routed_is_refused_by_its_class() -> None:
    x = torch.randn(2, 5, 16)
    model: Any = nn.Sequential(Silent())
    optx.attach(model, LSSAR3)
    with pytest.raises(optx.TargetError, match=r"on '0' \(Silent\) did nothing: its call did not reach"):
        model(x)
    cases: list[tuple[Any, Any, str]] = [
        (nn.Sequential(Own(fused=False)), "0", r"can't be routed into '0', a Own: it has fused_attn=False"),
        (
            nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, add_bias_kv=True)}),
            "a",
            "MultiheadAttention: it has add_bias",
        ),
        (nn.Sequential(nn.Linear(8, 8)), "0", "serves attention modules; '0' is a Linear"),
        (nn.Sequential(nn.Linear(8, 8)), None, "found nothing to serve"),
        (nn.ModuleDict({"a": Outer()}), ["a", "a.own"], "'a.own' is inside 'a'"),
        (
            built("llama", "flex_attention"),
            None,
            "a LlamaAttention, has attn_implementation='flex_attention'",
        ),
    ]
    for model, targets, said in cases:
        before = snapshot(model)
        with pytest.raises(optx.TargetError, match=said):
            optx.attach(model, LSSAR3, targets)
        assert_same(model, before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_position_biases_are_refused_by_their_class(implementation: str) -> None:
    """T5's, in both its directions and in cross-attention, whose bias is zeros."""
    model = built("t5", "eager")
    if implementation == "sdpa":
        if not model._supports_sdpa:
            pytest.skip("T5 in transformers 4")
        model.set_attn_implementation("sdpa")
    before = snapshot(model)
    for targets in (None, r".*\.EncDecAttention"):
        for injection in (optx.LSSA(), LSSAR3):
            with pytest.raises(
                optx.TargetError, match=r"'(en|de)coder\.\S+Attention', a T5Attention, adds a bias"
            ):
                optx.attach(model, injection, targets)
    assert_same(model, before)


def test_a_second_one_is_refused() -> None:
    model = built("llama")
    optx.attach(model, LSSAR3)
    with pytest.raises(optx.TargetError, match="has attention of this kind already, 'lssar'"):
        optx.attach(model, optx.LSSA())


def test_attention_that_rests_is_refused() -> None:
    model = built("llama")
    optx.attach(model, optx.S4D(d_state=4))
    with pytest.raises(optx.TargetError, match="'s4d' computes in the place of"):
        optx.attach(model, LSSAR3)
