"""Where an adapter's change goes in, and every choice of the design space (arXiv 2110.04366, table 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_methods import BERT_NORMS, adapter, run
from adapter_models import assert_close, bert, llama, moved, only, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import optx

F64 = torch.float64


# ---- where the change goes in --------------------------------------------------------------------------


def bert_block(**kinds: Any) -> tuple[Any, Tensor]:
    """One block of BERT in float64, and its input."""
    layer = bert("BertModel").double().encoder.layer[0]
    return layer, torch.randn(2, 5, 16, dtype=F64, generator=torch.Generator().manual_seed(4))


def block(layer: Any, x: Tensor) -> Tensor:
    """What a block returns; in a tuple in transformers 4."""
    out = layer(x)
    return out if isinstance(out, Tensor) else out[0]


def test_parallel_at_berts_ffn() -> None:
    """LN(u + FFN(u) + s A(u)), with u what the FFN reads."""
    layer, x = bert_block()
    u = layer.attention(x)[0]
    ffn = layer.output.dense(layer.intermediate(u))
    part = only(moved(layer, optx.ScaledParallelAdapter(rank=3, scale=2.5), "output"))
    assert_close(block(layer, x), layer.output.LayerNorm(u + ffn + 2.5 * adapter(part, u)), 1e-12)
    named = layer.output(hidden_states=layer.intermediate(u), input_tensor=u)
    assert torch.equal(named, layer.output(layer.intermediate(u), u))


def test_parallel_at_berts_attention_output() -> None:
    """The module that sums is also attention's: LN(x + Attn(x) + A(x))."""
    layer, x = bert_block()
    heads = layer.attention.self(x)[0]
    part = only(moved(layer, optx.ParallelAdapter(rank=3), r"attention\.output"))
    end = layer.attention.output
    assert_close(layer.attention(x)[0], end.LayerNorm(x + end.dense(heads) + adapter(part, x)), 1e-12)


def test_parallel_at_berts_attention() -> None:
    """Added to the concatenated heads, before their projection."""
    layer, x = bert_block()
    heads = layer.attention.self(x)[0]
    part = only(moved(layer, optx.ParallelAdapter(rank=3, position="attention"), r"attention\.self"))
    wanted = layer.attention.output(heads + adapter(part, x), x)
    assert_close(layer.attention(x)[0], wanted, 1e-12)


def test_sequential_in_bert() -> None:
    """On the output of the sub-layer's last linear layer: o + A(o), before the residual sum."""
    layer, x = bert_block()
    u = layer.attention(x)[0]
    o = layer.output.dense(layer.intermediate(u))
    part = only(moved(layer, optx.SequentialAdapter(rank=3), r"output\.dense"))
    assert_close(block(layer, x), layer.output.LayerNorm(u + o + adapter(part, o)), 1e-12)


def test_pfeiffers_place_is_the_norm() -> None:
    """LN(z + A(LN(z))), and what else hangs on the norm acts once."""
    layer, x = bert_block()
    norm = layer.output.LayerNorm
    u = layer.attention(x)[0]
    z = u + layer.output.dense(layer.intermediate(u))
    part = only(moved(layer, optx.SequentialAdapter(rank=3), r"output\.LayerNorm"))

    def again(z: Tensor) -> Tensor:
        return F.layer_norm(z, (16,), norm.weight, norm.bias, norm.eps)

    wanted = again(z + adapter(part, again(z)))
    assert_close(block(layer, x), wanted, 1e-10)
    shift = only(moved(layer, optx.BitFit(), r"output\.LayerNorm"))
    assert_close(block(layer, x), wanted + shift.delta, 1e-10)


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.self_attn"])
def test_sub_layers_of_llama(path: str) -> None:
    """h + A(x): the first item of a tuple, and an input that is given by name."""
    model = llama().double()
    module, seen = model.get_submodule(path), {}
    hook = module.register_forward_hook(lambda m, a, k, out: seen.update(a=a, k=k, out=out), with_kwargs=True)
    outputs(model)
    hook.remove()
    x = seen["a"][0] if seen["a"] else seen["k"]["hidden_states"]
    part = only(moved(model, optx.ParallelAdapter(rank=3), path))
    with torch.no_grad():
        out = module(*seen["a"], **seen["k"])
        if isinstance(out, tuple):
            assert len(out) == len(seen["out"])
            out, was = out[0], seen["out"][0]
        else:
            was = seen["out"]
        assert_close(out, was + adapter(part, x), 1e-12)


SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@settings(max_examples=30)
@given(
    shape=SHAPES,
    into=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 12),
    form=st.sampled_from(["relu", "gelu", "silu", "tanh", "linear"]),
    norm=st.sampled_from(["none", "in", "out"]),
    insertion=st.sampled_from(["parallel", "sequential"]),
    bias=st.booleans(),
    scale=st.one_of(st.just("learned"), st.floats(-3, 3)),
    dtype=st.sampled_from([torch.float32, F64, torch.bfloat16]),
)
def test_every_choice_is_the_formula(
    shape: list[int],
    into: int,
    out: int,
    rank: int,
    form: Any,
    norm: Any,
    insertion: Any,
    bias: bool,
    scale: Any,
    dtype: torch.dtype,
) -> None:
    module = nn.Linear(into, out, dtype=dtype)
    delta = optx.HiddenDelta(
        form, "ffn", insertion, "scaled", rank=rank, scale=scale, norm=norm, bias=bias, init="bert", std=0.5
    )
    x = torch.randn(*shape, into).to(dtype)
    h = module(x).detach()
    part = only(moved(nn.Sequential(module), delta, "0"))
    assert all(p.dtype == (F64 if dtype == F64 else torch.float32) for p in part.parameters())
    wide = {name: p.double() for name, p in part.named_parameters()}
    f: Any = {"tanh": torch.tanh, "linear": lambda z: z}.get(form) or getattr(F, form)

    def normed(z: Tensor, where: str) -> Tensor:
        if where != norm:
            return z
        return F.layer_norm(z, z.shape[-1:], wide["norm_weight"], wide["norm_bias"])

    z = normed((x if insertion == "parallel" else h).double(), "in")
    z = f(z @ wide["W_down"].t() + wide.get("b_down", 0.0)) @ wide["W_up"].t() + wide.get("b_up", 0.0)
    wanted = h.double() + normed(z, "out") * (wide["scale"] if scale == "learned" else scale)
    got = module(x)
    assert got.dtype == dtype
    if dtype == torch.bfloat16 and norm == "out":
        return  # a norm of a bfloat16 vector may be of its rounding alone
    tolerance = {torch.float32: 2e-4, F64: 1e-10, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


# ---- the design space ----------------------------------------------------------------------------------

ROWS: list[tuple[str, optx.HiddenDelta, optx.Injection]] = [
    (
        "prefix tuning",
        optx.HiddenDelta("softmax", "heads", "parallel", "gated", rank=3, init="bert"),
        optx.PrefixTuning(length=3),
    ),
    (
        "adapter, Houlsby",
        optx.HiddenDelta("relu", "both", "sequential", "add", rank=3),
        optx.SequentialAdapter(rank=3),
    ),
    (
        "adapter, after the FFN",
        optx.HiddenDelta("relu", "ffn", "sequential", "add", rank=3),
        optx.SequentialAdapter(rank=3, position="ffn"),
    ),
    (
        "parallel adapter",
        optx.HiddenDelta("relu", "ffn", "parallel", "add", rank=3),
        optx.ParallelAdapter(rank=3),
    ),
    (
        "parallel adapter, attention",
        optx.HiddenDelta("relu", "attention", "parallel", "add", rank=3),
        optx.ParallelAdapter(rank=3, position="attention"),
    ),
    (
        "multi-head parallel adapter",
        optx.HiddenDelta("relu", "heads", "parallel", "add", rank=3),
        optx.MultiHeadParallelAdapter(rank=3),
    ),
    (
        "scaled parallel adapter",
        optx.HiddenDelta("relu", "ffn", "parallel", "scaled", rank=3, scale=4.0),
        optx.ScaledParallelAdapter(rank=3, scale=4.0),
    ),
]


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize(("delta", "named"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_every_row_of_the_table_is_a_choice(
    make: Callable[[], Any], delta: optx.HiddenDelta, named: optx.Injection
) -> None:
    results = []
    for injection in (delta, named):
        model = make()
        handle = moved(model, injection)
        state = {key.replace(f".{injection.name}.", "."): t for key, t in handle.state_dict().items()}
        results.append((run(model), state))
    assert list(results[0][1]) == list(results[1][1])
    if named.name != "prefix":  # drawn at random, not moved away from zero alone
        for key, t in results[0][1].items():
            assert results[1][1][key].shape == t.shape
    shapes = [[tuple(t.shape) for t in state.values()] for _, state in results]
    assert shapes[0] == shapes[1]


def test_choices_decide_the_computation() -> None:
    """The same numbers in different places give different outputs."""
    seen = []
    for insertion, compose, scale in (
        ("parallel", "add", 1.0),
        ("parallel", "scaled", 2.0),
        ("sequential", "add", 1),
    ):
        model = llama()
        delta = optx.HiddenDelta("relu", "ffn", insertion, compose, rank=3, scale=scale)  # type: ignore[arg-type]
        handle = optx.attach(model, delta, r".*\.o_proj")
        with torch.no_grad():
            for index, p in enumerate(handle.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p).roll(index))
        seen.append(run(model))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((seen[0], seen[1]), (seen[0], seen[2])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modifies": "heads", "insertion": "sequential"},
            "modifies='heads' and insertion='sequential' don't",
        ),
        ({"form": "softmax"}, "form='softmax' and modifies='ffn' don't go together"),
        ({"form": "relu", "modifies": "heads", "compose": "gated"}, "compose='gated' and form='relu' don't"),
        ({"scale": 2.0}, "scale=2.0 has no place in compose='add'; use compose='scaled'"),
        ({"scale": "learned"}, "scale='learned' has no place in compose='add'"),
        ({"modifies": "heads", "norm": "in"}, "norm='in' has no place at the heads"),
        (
            {"form": "softmax", "modifies": "heads", "compose": "gated", "dropout": 0.1},
            "dropout=0.1 has no place",
        ),
        ({"kv_heads": 2}, "kv_heads and head_dim have no place but at the heads"),
        ({"mlp": 4}, "mlp=4 makes keys and values of a prefix"),
        ({"form": "sigmoid"}, "form is 'sigmoid'; it must be one of 'relu', 'gelu'"),
        ({"insertion": "beside"}, "insertion is 'beside'; it must be one of 'parallel', 'sequential'"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be between 0 and 1"),
        ({"compose": "scaled", "scale": "big"}, "scale is 'big'"),
        ({"compose": "scaled", "scale": math.nan}, "scale is nan"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=f"^HiddenDelta: {message}"):
        optx.HiddenDelta(**options)


def test_named_methods_say_their_own_name() -> None:
    with pytest.raises(optx.OptxError, match=r"^ScaledParallelAdapter: rank is 0"):
        optx.ScaledParallelAdapter(rank=0)
    with pytest.raises(optx.OptxError, match=r"^PrefixTuning: length is 0"):
        optx.PrefixTuning(length=0)
    with pytest.raises(optx.OptxError, match=r"^SequentialAdapter: form='softmax' and modifies='both'"):
        optx.SequentialAdapter(form="softmax")
    with pytest.raises(optx.OptxError, match=r"^MAM: prefix is 0"):
        optx.MAM(prefix=0)


@pytest.mark.parametrize(
    ("make", "injection", "targets", "message"),
    [
        (bert, optx.ParallelAdapter(), r".*\.\d\.output\.dropout", r"dropout' is a Dropout\."),
        (bert, optx.SequentialAdapter(), r".*\.\d\.output", "is a BertOutput, whose output is normalised"),
        (bert, optx.ParallelAdapter(), BERT_NORMS, r"LayerNorm' is a LayerNorm\."),
        (llama, optx.ParallelAdapter(), r"model\.embed_tokens", r"is a Embedding|is an Embedding"),
    ],
)
def test_modules_it_cannot_serve(make: Any, injection: optx.Injection, targets: str, message: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, injection, targets)
    assert list(model.state_dict()) == keys


def test_a_module_whose_ends_are_not_linear() -> None:
    """Found at the call: the width of what comes out is not that of the last linear layer."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.router(x).softmax(-1)[..., :1]

    model = nn.Sequential(Routed())
    optx.attach(model, optx.ParallelAdapter(rank=2), "0")
    with pytest.raises(optx.ShapeError, match="vectors of width 6 and outputs of 2 got 6 and 6"):
        model(torch.randn(3, 6))
