"""`optx.scaling.init_`: what is rescaled, recognised, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mup_models import MLP, Transformer
from torch import nn
from width_models import t5

import optx


def fresh(make: Any = MLP, width: int = 64) -> Any:
    torch.manual_seed(0)
    return make(width)


def shapes_of(model: nn.Module, make: Any = MLP) -> Any:
    return optx.scaling.shapes(model, base=make(16), delta=make(32))


def factors(model: nn.Module, **options: Any) -> dict[str, float]:
    """By what each parameter was multiplied."""
    make = type(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optx.scaling.init_(model, shapes_of(model, make), **options)
    return {n: float(p.detach().norm() / before[n].norm()) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("table", "first", "hidden", "head"),
    [
        ("mup", 1.0, 1.0, 2.0),
        ("mup-table3", 1.0, 1.0, 0.5),
        ("mup-table9", 0.5, 1.0, 1.0),
        ("standard", 1, 1, 1),
    ],
)
def test_tables_on_torchs_own_draws(table: str, first: float, hidden: float, head: float) -> None:
    """torch's shrink as 1 / sqrt(fan-in) already; the tables differ in the first and the last layer."""
    found = factors(fresh(), parametrization=table)
    assert found["first.weight"] == pytest.approx(first)
    assert found["hidden.weight"] == pytest.approx(hidden)
    assert found["back.weight"] == pytest.approx(hidden)
    assert found["head.weight"] == pytest.approx(head)


def test_a_fixed_size_shrinks_in_matrices_alone() -> None:
    transformers = pytest.importorskip("transformers")
    for tied in (False, True):

        def make(width: int, tied: bool = tied) -> nn.Module:
            config = transformers.LlamaConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=64,
                tie_word_embeddings=tied,
            )
            return transformers.LlamaForCausalLM(config)

        model = make(64)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        shapes = optx.scaling.shapes(model, base=make(16))
        optx.scaling.init_(model, shapes)
        for name, p in model.named_parameters():
            factor = 0.5 if shapes[name].kind == "matrix" else 1.0
            assert torch.equal(p, before[name] * factor), name


def test_gpt2s_projections_are_recognised_by_their_depth() -> None:
    transformers = pytest.importorskip("transformers")

    def make(width: int) -> nn.Module:
        config = transformers.GPT2Config(n_embd=width, n_layer=3, n_head=2, vocab_size=64, n_positions=16)
        return transformers.GPT2LMHeadModel(config)

    model = make(64)
    shapes = optx.scaling.shapes(model, base=make(16))
    before = model.transformer.h[1].attn.c_proj.weight.detach().clone()
    optx.scaling.init_(model, shapes)
    assert torch.equal(model.transformer.h[1].attn.c_proj.weight, before / 2)


def test_xaviers_draws_are_recognised() -> None:
    model = fresh()
    for p in (model.first.weight, model.hidden.weight, model.head.weight):
        nn.init.xavier_uniform_(p)
    found = factors(model)
    both = {"first.weight": (12 + 64) / (12 + 16), "hidden.weight": 4, "head.weight": (64 + 5) / (16 + 5)}
    init = {"first.weight": 1.0, "hidden.weight": 0.5, "head.weight": 1.0}
    for name, grown in both.items():
        assert found[name] == pytest.approx(init[name] * grown**0.5)


def test_a_draw_that_may_be_either_must_be_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.707, 0.707], [-0.707, 0.707]]) * 0.9)
    shapes = optx.scaling.shapes(model, base=nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)))
    with pytest.raises(optx.OptxError, match=r"'0\.weight' is too small to tell"):
        optx.scaling.init_(model, shapes)


def test_once_and_not_twice() -> None:
    model = fresh()
    optx.scaling.init_(model, shapes_of(model))
    was = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(optx.OptxError, match="rescaled before"):
        optx.scaling.init_(model, shapes_of(model))
    assert all(map(torch.equal, was, model.parameters()))
    for module in (model.first, model.hidden, model.back, model.head):
        module.reset_parameters()
    optx.scaling.init_(model, shapes_of(model), again=True)


def test_trained_weights_are_left_alone() -> None:
    model = fresh()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(20):
        opt.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        opt.step()
    was = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(optx.OptxError, match=r"no first draw that is known here .*fresh='fan_in'"):
        optx.scaling.init_(model, shapes_of(model))
    assert all(map(torch.equal, was, model.parameters()))
    assert "_optx_first_weights" not in vars(model)


def test_weights_of_a_checkpoint_are_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    wide, narrow = (
        transformers.LlamaConfig(hidden_size=width, intermediate_size=2 * width, **sizes)
        for width in (64, 16)
    )
    model = transformers.LlamaForCausalLM(wide)
    shapes = optx.scaling.shapes(model, base=narrow)
    model.config._name_or_path = "some/llama"
    with pytest.raises(optx.OptxError, match="weights come from 'some/llama'"):
        optx.scaling.init_(model, shapes)
    optx.scaling.init_(model, shapes, fresh="fixed")


def test_what_is_said_of_a_draw_is_taken() -> None:
    model = fresh()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.05)
    with pytest.raises(optx.OptxError, match=r"'first\.weight' has values of size 0\.05"):
        factors(model)
    found = factors(model, fresh="fixed")
    assert found["hidden.weight"] == pytest.approx(0.5)
    assert found["hidden.bias"] == found["head.weight"] == 1.0
    assert factors(model, fresh="fan_in", again=True)["head.bias"] == pytest.approx(2.0)


def test_zeros() -> None:
    model = fresh(Transformer)
    factors(model, zero_output=True)
    assert not model.head.weight.any()
    model = fresh(Transformer)
    model.q_proj = nn.Linear(64, 64)
    shapes = optx.scaling.shapes(model, base=_with_query(16))
    optx.scaling.init_(model, shapes, zero_query=True)
    assert not model.q_proj.weight.any()
    assert model.head.weight.any()
    with pytest.raises(optx.OptxError, match="no parameter is named as queries are"):
        factors(fresh(), zero_query=True)


def _with_query(width: int) -> nn.Module:
    model = Transformer(width)
    model.q_proj = nn.Linear(width, width)
    return model


def test_refusals_change_nothing() -> None:
    model = fresh()
    was = [p.detach().clone() for p in model.parameters()]
    other = shapes_of(MLP(32))
    for options, message in (
        ({"shapes": other}, "another model's"),
        ({"fresh": "trained"}, "fresh is 'trained'"),
        ({"parametrization": "mupp"}, "Near"),
    ):
        with pytest.raises(optx.OptxError, match=message):
            optx.scaling.init_(model, **{"shapes": shapes_of(model), **options})
    with torch.device("meta"):
        empty = MLP(64)
    with pytest.raises(optx.OptxError, match="meta device"):
        optx.scaling.init_(empty, shapes_of(model))
    assert all(map(torch.equal, was, model.parameters()))


def test_fused_queries_are_refused_by_name() -> None:
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.MultiheadAttention(width, 2), nn.Linear(width, 3))

    model = make(64)
    shapes = optx.scaling.shapes(model, base=make(16))
    with pytest.raises(optx.OptxError, match=r"'0\.in_proj_weight' holds queries, keys and values"):
        optx.scaling.init_(model, shapes, zero_query=True)


@pytest.mark.parametrize("fresh", [None, "fan_in"])
def test_t5s_draws_are_its_own(fresh: str | None) -> None:
    """Its queries' hold the scale that its logits don't have, its table of positions the model's width."""
    transformers = pytest.importorskip("transformers")
    made = {width: transformers.T5ForConditionalGeneration(t5(width)) for width in (64, 256)}
    first = {name: p.detach().clone() for name, p in made[256].named_parameters()}
    optx.scaling.init_(made[256], optx.scaling.shapes(made[256], base=made[64]), fresh=fresh)
    block = "encoder.block.0.layer.0.SelfAttention"
    for name, wanted in {
        f"{block}.q.weight": 0.5,  # as all matrices: by the square root of a ratio of 4
        f"{block}.k.weight": 0.5,
        f"{block}.o.weight": 0.5,
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": 0.5,
        f"{block}.relative_attention_bias.weight": 1.0,
        "shared.weight": 1.0,
    }.items():
        wide, narrow = (made[width].get_parameter(name).detach().std() for width in (256, 64))
        assert float(wide / narrow) == pytest.approx(wanted, rel=0.25 if "bias" in name else 0.05), name
        factor = made[256].get_parameter(name).detach() / first[name]
        assert float(factor.max()) == pytest.approx(float(factor.min()), rel=1e-5)


def test_a_t5_that_was_trained_is_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    model, base = (transformers.T5ForConditionalGeneration(t5(width)) for width in (128, 64))
    with torch.no_grad():
        model.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight").mul_(1.3)
    with pytest.raises(optx.OptxError, match=r"q\.weight' has values of size .* no first draw"):
        optx.scaling.init_(model, optx.scaling.shapes(model, base=base))
