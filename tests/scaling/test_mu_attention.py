"""`optx.MuAttention`: logits equal to attention whose queries were scaled by hand, in every kind of model."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from width_models import FAMILIES, bert, built, gpt2, llama, qwen3, t5, vit

import optx

TOKENS = torch.tensor([[5, 9, 7, 30, 22], [3, 3, 40, 12, 6]])
WIDTH, BASE = 64, 16  # heads are 32 and 8 wide


def run(model: Any) -> Tensor:
    """Logits in float64, so that ways to the same number differ by nothing that counts."""
    if hasattr(model.config, "image_size"):
        return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)).logits
    more = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(TOKENS, **more).logits


def at(kind: str, width: int, **options: Any) -> nn.Module:
    model = built(FAMILIES[kind](width, **options)).double()
    for p in model.parameters():  # logits of fresh weights are too small to matter
        if p.ndim > 1:
            p.data.mul_(6)
    return model


def shapes_of(kind: str, **options: Any) -> optx.scaling.Shapes:
    make = FAMILIES[kind]
    return optx.scaling.shapes(make(WIDTH, **options), base=make(BASE, **options))


QUERIES: dict[str, Callable[[str], bool]] = {
    "llama": lambda name: "q_proj" in name,
    "qwen2": lambda name: "q_proj" in name,
    "mixtral": lambda name: "q_proj" in name,
    "qwen3": lambda name: "q_norm" in name,  # which would undo a factor of q_proj
    "qwen3_moe": lambda name: "q_norm" in name,
    "bert": lambda name: "query" in name,
    "vit": lambda name: "q_proj" in name,
    "t5": lambda name: name.endswith("q.weight"),
    "gpt2": lambda name: "c_attn" in name,
}


def scale_by_hand(model: nn.Module, kind: str, factor: float) -> None:
    """Multiply what makes the queries, weight and bias."""
    found = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if QUERIES[kind](name):
                (p[..., : p.shape[-1] // 3] if kind == "gpt2" else p).mul_(factor)
                found += 1
    assert found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_queries_scaled_by_hand(kind: str, implementation: str) -> None:
    model = at(kind, WIDTH, attn_implementation=implementation)
    model.load_state_dict(at(kind, WIDTH).state_dict())
    plain = run(model)
    wanted = 1.0 if kind == "t5" else math.sqrt(WIDTH / 2)  # what it is divided by at first
    factor = 8 / 32 if kind == "t5" else math.sqrt(8) / 32 * wanted
    by_hand = copy.deepcopy(model)
    scale_by_hand(by_hand, kind, factor)
    reference = run(by_hand)
    assert (reference - plain).abs().max() > 1e-3
    with optx.attach(model, optx.MuAttention(shapes_of(kind))) as handle:
        torch.testing.assert_close(run(model), reference, rtol=1e-9, atol=1e-9)
        with handle.disable():
            assert torch.equal(run(model), plain)
    assert torch.equal(run(model), plain)


def test_gpt2s_other_scales_stay() -> None:
    """The layer's number divides on, and a model without a scale has none at the base's width."""
    for option, own in (
        ("scale_attn_by_inverse_layer_idx", [8**-0.5, 8**-0.5 / 2]),
        ("scale_attn_weights", [1, 1]),
    ):
        options = {option: option != "scale_attn_weights"}
        model = at("gpt2", WIDTH, **options)
        handle = optx.attach(model, optx.MuAttention(shapes_of("gpt2", **options)))
        scales = [one.part.scale for one in handle.served]
        assert scales == pytest.approx([scale * 8 / 32 for scale in own], rel=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_at_the_bases_width_nothing_changes(kind: str) -> None:
    make = FAMILIES[kind]
    model = at(kind, BASE)
    plain = run(model)
    optx.attach(model, optx.MuAttention(optx.scaling.shapes(make(BASE), base=make(BASE), delta=make(WIDTH))))
    assert torch.equal(run(model), plain)


def test_more_heads_of_one_width_keep_their_scale() -> None:
    model = built(qwen3(64, num_attention_heads=8, head_dim=8)).double()
    plain = run(model)
    shapes = optx.scaling.shapes(model, base=qwen3(16, num_attention_heads=2, head_dim=8))
    optx.attach(model, optx.MuAttention(shapes))
    assert torch.equal(run(model), plain)


# ---- torch's modules ----------------------------------------------------------------------------------


def mha(width: int, heads: int = 2, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(width, heads, dtype=torch.float64, **options)


def attention_by_hand(module: Any, x: Tensor, memory: Tensor, scale: float) -> Tensor:
    """Batch first, one head after the other."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (0, 0, 0) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (y @ w.T + b for y, w, b in zip((x, memory, memory), weights, biases, strict=True))
    if module.bias_k is not None:
        k, v = (
            torch.cat([y, b.expand(len(y), 1, -1)], 1) for y, b in ((k, module.bias_k), (v, module.bias_v))
        )
    heads = zip(*(y.chunk(module.num_heads, -1) for y in (q, k, v)), strict=True)
    out = [torch.softmax(scale * q @ k.mT, -1) @ v for q, k, v in heads]
    return F.linear(torch.cat(out, -1), module.out_proj.weight, module.out_proj.bias)


@settings(max_examples=25, deadline=None)
@given(
    ratio=st.sampled_from([1, 2, 3, 5]),
    heads=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    extra=st.booleans(),
    kdim=st.sampled_from([None, 6]),
    batch_first=st.booleans(),
    need_weights=st.booleans(),
    evaluated=st.booleans(),
)
def test_torchs_attention(
    ratio: int,
    heads: int,
    bias: bool,
    extra: bool,
    kdim: int | None,
    batch_first: bool,
    need_weights: bool,
    evaluated: bool,
) -> None:
    options = {"bias": bias, "add_bias_kv": extra, "kdim": kdim, "vdim": kdim, "batch_first": batch_first}
    width = 8 * ratio
    model = nn.ModuleDict({"attention": mha(width, heads, **options)}).train(not evaluated)
    makes = [lambda w=w: nn.ModuleDict({"attention": mha(w, heads, **options)}) for w in (8, 16)]
    shapes = optx.scaling.shapes(model, base=makes[0], delta=makes[1])
    optx.attach(model, optx.MuAttention(shapes))
    x = torch.randn(3, 5, width, dtype=torch.float64)
    memory = x if kdim is None else torch.randn(3, 4, kdim, dtype=torch.float64)
    given_ = (x, memory, memory) if batch_first else [y.transpose(0, 1) for y in (x, memory, memory)]
    with torch.set_grad_enabled(not evaluated):
        out, weights = model["attention"](*given_, need_weights=need_weights)
    out = out if batch_first else out.transpose(0, 1)
    scale = math.sqrt(8 / heads) / (width / heads)
    reference = attention_by_hand(model["attention"], x, memory, scale)
    torch.testing.assert_close(out, reference, rtol=1e-9, atol=1e-9)
    assert (weights is None) != need_weights


class Another(nn.MultiheadAttention):
    """One that computes attention in its own way."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(query, key, value), None


def test_a_subclass_that_computes_in_its_own_way_is_noticed() -> None:
    model = nn.ModuleDict({"attention": Another(32, 2)})
    base = nn.ModuleDict({"attention": Another(8, 2)})
    optx.attach(model, optx.MuAttention(optx.scaling.shapes(model, base=base)))
    x = torch.randn(2, 3, 32)
    with pytest.raises(optx.TargetError, match="on a Another did nothing"):
        model["attention"](x, x, x)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_takes_no_way_around(norm_first: bool) -> None:
    """Its fast path, in eval mode without gradients, hands weights to one kernel."""

    def make(width: int) -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()

    model = make(32)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for layer in reference.layers:
            for p in (layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias):
                p[:32] *= 0.5  # sqrt(4 / 16)
    optx.attach(model, optx.MuAttention(optx.scaling.shapes(model, base=make(8))))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training in (True, False):
        for module in (model, reference):
            module.train(training)
        with torch.set_grad_enabled(training):
            out, wanted = (m(x, src_key_padding_mask=padding)[~padding] for m in (model, reference))
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


class Fused(nn.Module):
    """Attention in the way of timm's, whose fused path leaves the scale to torch."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = 2, width // 2, fused
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.softmax(self.scale * q @ k.mT, -1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def test_timms_way_of_attention() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(Fused(32, fused)).double() for fused in (True, False)]
    reference = copy.deepcopy(models[0])
    models[1].load_state_dict(reference.state_dict())
    with torch.no_grad():
        reference[0].qkv.weight[:32] *= 0.5
        reference[0].qkv.bias[:32] *= 0.5
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for model in models:
        shapes = optx.scaling.shapes(model, base=lambda: nn.Sequential(Fused(8, True)))
        optx.attach(model, optx.MuAttention(shapes))
        torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-9)


# ---- with torch's other machinery -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("gpt2", "mha", "fused"))]
)
def test_compile_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    if kind in ("mha", "fused"):
        make = (lambda w: nn.Sequential(Fused(w, True))) if kind == "fused" else encoder
        model, inputs = make(32).eval(), torch.randn(2, 5, 32)
        shapes, call = optx.scaling.shapes(model, base=make(8)), (lambda m: m(inputs))
    else:
        one: Any = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 1}  # each is traced anew
        model, shapes = at(kind, WIDTH, **one), shapes_of(kind, **one)
        call = run
    plain = call(model)
    optx.attach(model, optx.MuAttention(shapes))
    eager = call(model)
    assert not torch.allclose(eager, plain)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled), eager)
    torch.testing.assert_close(call(compiled), eager)  # what the call exchanges is back in its place


def encoder(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True))


def test_it_leaves_no_trace_and_no_keys() -> None:
    model = at("llama", WIDTH)
    before, keys = snapshot(model), list(model.state_dict())
    handle = optx.attach(model, optx.MuAttention(shapes_of("llama")))
    assert list(model.state_dict()) == keys
    model.load_state_dict(at("llama", WIDTH).state_dict(), strict=True)
    run(model).sum().backward()
    model.zero_grad()
    assert list(handle.parameters()) == []
    handle.remove()
    assert_same(model, before)


def test_an_exception_in_a_call_gives_the_scale_back() -> None:
    model = at("llama", WIDTH)
    optx.attach(model, optx.MuAttention(shapes_of("llama")))
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    attention = model.model.layers[0].self_attn
    with pytest.raises(AttributeError):
        attention(None)
    assert attention.scaling == 32**-0.5


def test_a_copy_acts_by_itself() -> None:
    model = at("gpt2", WIDTH)
    handle = optx.attach(model, optx.MuAttention(shapes_of("gpt2")))
    twin = copy.deepcopy(model)
    served = run(model)
    handle.remove()
    assert torch.equal(run(twin), served)
    assert not torch.allclose(run(model), served)


def test_autocast_and_checkpointing() -> None:
    from injections import checkpoint_layers

    model = at("llama", WIDTH).float()
    optx.attach(model, optx.MuAttention(shapes_of("llama")))
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model)
    torch.testing.assert_close(half.float(), run(model), rtol=0.1, atol=0.3)
    model.train()
    run(model).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint_layers(model)
    run(model).square().sum().backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_threads_do_not_meet() -> None:
    """A scale that is exchanged for a call is not seen, or left behind, by another's."""
    model = at("llama", WIDTH)
    optx.attach(model, optx.MuAttention(shapes_of("llama")))
    with torch.no_grad():
        wanted = run(model)
        results: list[Tensor] = []
        threads = [
            threading.Thread(target=lambda: results.extend(no_grad_run(model) for _ in range(10)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 40
    assert all(torch.equal(one, wanted) for one in results)
    assert model.model.layers[1].self_attn.scaling == 32**-0.5


def no_grad_run(model: Any) -> Tensor:
    with torch.no_grad():
        return run(model)


def test_a_folder_gives_it_back(tmp_path: Path) -> None:
    model = at("bert", WIDTH)
    handle = optx.attach(model, optx.MuAttention(shapes_of("bert")))
    served = run(model)
    handle.save(tmp_path / "scale")
    fresh = at("bert", WIDTH)
    again = optx.attach(fresh, tmp_path / "scale")
    assert again.injection == handle.injection
    assert torch.equal(run(fresh), served)


# ---- what it refuses ----------------------------------------------------------------------------------


def test_a_second_scale_is_refused() -> None:
    model = at("llama", WIDTH)
    injection = optx.MuAttention(shapes_of("llama"))
    optx.attach(model, injection)
    for name in (None, "again"):
        with pytest.raises(
            optx.TargetError, match=r"'model.layers.0.self_attn' has a scale of width already"
        ):
            optx.attach(model, injection, name=name)


def test_other_shapes_are_refused() -> None:
    model = at("llama", WIDTH)
    with pytest.raises(optx.OptxError, match="another model's: this one has no parameter 'transformer"):
        optx.attach(model, optx.MuAttention(shapes_of("gpt2")))
    with pytest.raises(optx.OptxError, match="shapes is a dict; it must be what optx"):
        optx.MuAttention({})  # type: ignore[arg-type]


class OwnAttention(nn.Module):
    """One that says neither how wide its heads are nor what it multiplies with."""

    def __init__(self, width: int, heads: int | None = None) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        if heads is not None:
            self.num_heads, self.head_dim, self.scaling = heads, width // heads, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


@pytest.mark.parametrize(("heads", "why"), [(None, "don't have the width of heads"), (2, "can't tell where")])
def test_attention_that_says_nothing_is_refused_by_name(heads: int | None, why: str) -> None:
    model = nn.Sequential(OwnAttention(16, heads))
    shapes = optx.scaling.shapes(model, base=nn.Sequential(OwnAttention(8, heads)))
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=f"{why}.* '0', a OwnAttention"):
        optx.attach(model, optx.MuAttention(shapes))
    assert_same(model, before)


def test_it_is_no_change_of_weights() -> None:
    model = built(bert(WIDTH))
    handle = optx.attach(model, optx.MuAttention(shapes_of("bert")))
    with pytest.raises(optx.MergeError, match="is not a change of the module's weights"):
        handle.merge()


def test_the_families_here_are_what_is_asked_for() -> None:
    assert {llama, qwen3, gpt2, bert, vit, t5} <= set(FAMILIES.values())
    assert QUERIES.keys() == FAMILIES.keys()
