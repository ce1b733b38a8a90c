"""Adapters on hidden vectors: the laws of the unified view (arXiv 2110.04366) on small real models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_models import assert_close, bert, gpt2, ids, llama, moved, only, outputs, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import checkpoint_layers, no_dropout
from torch import Tensor, nn
from torch.nn import functional as F

import optx

F64 = torch.float64
BERT_NORMS = r".*\.\d+\.output\.LayerNorm"


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **sizes)).eval()


def run(model: Any) -> Tensor:
    if "ViT" in type(model).__name__:
        return outputs(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return outputs(model)


def adapter(part: Any, x: Tensor) -> Tensor:
    """f(x W_down + b_d) W_up + b_u, of a relu adapter without norm, and without its scale."""
    return torch.relu(x @ part.W_down.t() + part.b_down) @ part.W_up.t() + part.b_up


METHODS: dict[str, tuple[Callable[[], optx.Injection], bool]] = {
    "sequential": (lambda: optx.SequentialAdapter(rank=3), True),
    "sequential ffn": (lambda: optx.SequentialAdapter(rank=3, position="ffn", norm="in"), True),
    "sequential norm": (lambda: optx.SequentialAdapter(rank=3, norm="out", form="gelu"), True),
    "parallel": (lambda: optx.ParallelAdapter(rank=3), True),
    "parallel attention": (lambda: optx.ParallelAdapter(rank=3, position="attention"), True),
    "scaled": (lambda: optx.ScaledParallelAdapter(rank=3), True),
    "scaled both": (lambda: optx.ScaledParallelAdapter(rank=3, scale="learned", position="both"), True),
    "multihead": (lambda: optx.MultiHeadParallelAdapter(rank=3), True),
    "bert start": (lambda: optx.ParallelAdapter(rank=3, init="bert"), False),
    "prefix": (lambda: optx.PrefixTuning(length=3), False),
}


# ---- the spec's laws -----------------------------------------------------------------------------------


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
        with pytest.raises(optx.TargetError, match=r"ViTModel is a ViT \(transformers 4\)\. Pass targets="):
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


# ---- training --------------------------------------------------------------------------------------------


def loss_of(model: Any) -> Tensor:
    out = model(ids())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()


def grads(model: Any, handle: optx.Handle) -> list[Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.clone() for p in handle.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [llama, bert])
def test_gradients_under_checkpointing(make: Callable[[], Any]) -> None:
    model = make().train()
    model.config.use_cache = False  # as checkpointing has it: a cache brings a mask, and other rounding
    handle = moved(model, optx.MAM(prefix=2, rank=3, mlp=4))
    optx.trainable_only(model, handle)
    no_dropout(model)
    plain = grads(model, handle)
    assert len(plain) == len(handle.parameters())
    assert all(float(g.abs().max()) > 0 for g in plain)
    checkpoint_layers(model)
    for a, b in zip(grads(model, handle), plain, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(4, 3, dtype=F64))
    handle = moved(model, optx.HiddenDelta("tanh", compose="scaled", scale="learned", rank=2, norm="in"), "0")
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    names = [name for name, _ in handle.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in handle.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_dropout_acts_while_training_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).train()
    moved(model, optx.ParallelAdapter(rank=8, dropout=0.5), "0")
    x = torch.randn(5, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_compiles_as_one_graph() -> None:
    """What the table of test_attach_torch.py has no row for."""
    model = bert()
    moved(model, optx.SequentialAdapter(rank=3), BERT_NORMS)
    optx.attach(model, optx.ParallelAdapter(rank=3, position="attention", norm="out"))
    optx.attach(model, optx.HiddenDelta("softmax", "heads", rank=3, init="bert"))
    wanted = outputs(model)
    torch._dynamo.reset()
    assert_close(outputs(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted, 1e-6)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_the_precision_of_what_is_summed(make: Callable[[], Any], method: str) -> None:
    """Under autocast the residual stream of BERT is float32: an adapter must not round it."""
    model = make()
    dtypes: dict[str, list[torch.dtype]] = {"bare": [], "served": []}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for run_of in ("bare", "served"):
            handle = moved(model, METHODS[method][0]()) if run_of == "served" else None
            hooks = [
                m.register_forward_hook(lambda _m, _a, out, key=run_of: dtypes[key].append(_first(out).dtype))
                for path, m in model.named_modules()
                if "optx" not in path and type(m).__name__ not in ("DynamicCache",)
            ]
            out = outputs(model)
            for hook in hooks:
                hook.remove()
            assert handle is None or all(p.dtype == torch.float32 for p in handle.parameters())
    assert dtypes["bare"] == dtypes["served"]
    assert_close(out.float(), outputs(model), 0.1)


def _first(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else next(iter(out.values()))


def test_the_output_keeps_its_precision() -> None:
    """A sub-layer may give less than it reads."""

    class Rounding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    model = nn.Sequential(Rounding(4, 4))
    moved(model, optx.ParallelAdapter(rank=2), "0")
    assert model(torch.randn(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_model(method: str) -> None:
    model = llama().bfloat16()
    handle = moved(model, METHODS[method][0]())
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    out = outputs(model)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), outputs(model.float()), 0.15)


@pytest.mark.parametrize("method", [*METHODS, "mam"])
def test_state_comes_back(method: str) -> None:
    make = METHODS[method][0] if method in METHODS else lambda: optx.MAM(prefix=2, rank=3, scale="learned")
    model, fresh = llama(), llama()
    handle = moved(model, make())
    state = {key: t.clone() for key, t in handle.state_dict().items()}
    again = optx.attach(fresh, make())
    again.load_state_dict(state)
    assert torch.equal(outputs(fresh), outputs(model))
    assert type(make()).from_options(make().options()) == make()


def test_training_resumes_bit_for_bit() -> None:
    def start() -> tuple[Any, optx.Handle, torch.optim.Optimizer]:
        model = bert().train()
        torch.manual_seed(7)
        handle = optx.attach(model, optx.MAM(prefix=2, rank=3, mlp=4))
        optx.trainable_only(model, handle)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2)

    def steps(model: Any, opt: torch.optim.Optimizer, first: int, last: int) -> None:
        for number in range(first, last):
            torch.manual_seed(number)  # dropout
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()

    model, handle, opt = start()
    steps(model, opt, 0, 6)
    half, half_handle, half_opt = start()
    steps(half, half_opt, 0, 3)
    saved = copy.deepcopy((half_handle.state_dict(), half_opt.state_dict()))
    rest, rest_handle, rest_opt = start()
    rest_handle.load_state_dict(saved[0])
    rest_opt.load_state_dict(saved[1])
    steps(rest, rest_opt, 3, 6)
    for a, b in zip(rest_handle.parameters(), handle.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(handle.parameters()[0], half_handle.parameters()[0])


def test_training_reduces_the_loss() -> None:
    model = bert().eval()
    handle = optx.attach(model, optx.ScaledParallelAdapter(rank=4, scale="learned"))
    optx.trainable_only(model, handle)
    opt = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (model(ids()).logits - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        opt.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(one.part.scale.detach()) != 1 for one in handle.served)
