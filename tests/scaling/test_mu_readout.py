"""`optx.MuReadout`: what the package mup's module computes, on heads, routers and tied embeddings."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from width_models import FAMILIES, bert, built, gpt2, llama, mixtral, qwen2, t5, vit

import optx
from optx.scaling import Shapes

TOKENS = torch.tensor([[5, 9, 7, 30, 22], [3, 3, 40, 12, 6]])
HEADS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gpt2", "t5", "mixtral", "qwen3_moe"), "lm_head"),
    **{"bert": "cls.predictions.decoder", "vit": "classifier"},
}


def run(model: Any) -> Tensor:
    if hasattr(model.config, "image_size"):
        return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).logits
    more = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(TOKENS, **more).logits


def mlp(width: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3, bias))


def widened(kind: str, width: int = 64, **options: Any) -> tuple[Any, Shapes]:
    make = FAMILIES[kind]
    shapes = optx.scaling.shapes(make(width, **options), base=make(16, **options))
    return built(make(width, **options)), shapes


# ---- what it computes ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.sampled_from([1, 2, 3, 7]),
    output_mult=st.floats(0.01, 100),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_a_head(ratio: int, output_mult: float, bias: bool, dtype: torch.dtype) -> None:
    """y = W (s x / m) + b: the bias is not multiplied, and at ratio 1 and s = 1 not a bit changes."""
    model = mlp(8 * ratio, bias).to(dtype)
    x = torch.randn(5, 6).to(dtype)
    shapes = optx.scaling.shapes(mlp(8 * ratio, bias), base=mlp(8, bias), delta=mlp(16, bias))
    hidden = model[:3](x)
    with torch.no_grad():
        reference = F.linear(hidden * (output_mult / ratio), model[3].weight, model[3].bias)
    handle = optx.attach(model, optx.MuReadout(shapes, output_mult=output_mult))
    assert [row.module for row in handle.report().rows] == ["3"]
    torch.testing.assert_close(model(x), reference, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    if ratio == 1 and output_mult == 1.0:
        assert torch.equal(model(x), reference)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_familys_logits(kind: str) -> None:
    """A head alone is multiplied: tied, with a bias, beside T5's own factor."""
    model, shapes = widened(kind)
    plain = run(model)
    head = model.get_submodule(HEADS[kind])
    offset = head.bias if getattr(head, "bias", None) is not None else 0.0
    factor = 0.5 if kind == "t5" else 0.25  # T5's head has 64 ** -0.5 already, and 16 ** -0.5 in base
    handle = optx.attach(model, optx.MuReadout(shapes), targets=HEADS[kind])
    torch.testing.assert_close(run(model), (plain - offset) * factor + offset, rtol=1e-4, atol=1e-5)
    with handle.disable():
        assert torch.equal(run(model), plain)
    handle.remove()
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_served_by_default_in_a_family(kind: str) -> None:
    model, shapes = widened(kind)
    served = {one.path for one in optx.attach(model, optx.MuReadout(shapes)).served}
    routers = {path for path, _ in model.named_modules() if path.endswith("mlp.gate")}
    assert served == {HEADS[kind], *routers}
    assert bool(routers) == (kind in ("mixtral", "qwen3_moe"))


def test_a_router_has_its_logits_multiplied() -> None:
    model, shapes = widened("mixtral")
    gate = model.model.layers[0].mlp.gate
    x = torch.randn(7, 64)
    optx.attach(model, optx.MuReadout(shapes))
    torch.testing.assert_close(gate(x)[0], F.linear(x, gate.weight) / 4)


def test_keys_of_a_fixed_number_of_heads_read_out_until_said_otherwise() -> None:
    make = {"num_attention_heads": 8, "head_dim": 8}
    base = llama(16, head_dim=8)
    shapes = optx.scaling.shapes(llama(64, **make), base=base)
    model = built(llama(64, **make))
    served = {one.path.rpartition(".")[2] for one in optx.attach(model, optx.MuReadout(shapes)).served}
    assert served == {"k_proj", "v_proj", "lm_head"}
    hidden = shapes.set(matrix=r".*\.[kv]_proj\.weight")
    handle = optx.attach(built(llama(64, **make)), optx.MuReadout(hidden))
    assert [one.path for one in handle.served] == ["lm_head"]


def test_a_convolution_and_a_transposed_one() -> None:
    def make(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        middle = nn.ConvTranspose2d(width, 5, 2, stride=2)
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 1), middle)

    model = make(16)
    x = torch.randn(2, 3, 6, 6)
    bias = model[2].bias[:, None, None]
    reference = (model(x) - bias) / 4 + bias
    handle = optx.attach(model, optx.MuReadout(optx.scaling.shapes(model, base=make(4))))
    assert [one.path for one in handle.served] == ["2"]
    torch.testing.assert_close(model(x), reference)


def test_another_parametrization_has_factors_of_embeddings() -> None:
    """Table 9: the square root of the width at the embedding, and one over it at the head, tied or not."""
    model, shapes = widened("qwen2")
    table = model.model.embed_tokens(TOKENS)
    handle = optx.attach(model, optx.MuReadout(shapes, parametrization="mup-table9"))
    assert {one.path: one.part.factor for one in handle.served} == {
        "model.embed_tokens": pytest.approx(2.0),
        "lm_head": pytest.approx(0.5),
    }
    torch.testing.assert_close(model.model.embed_tokens(TOKENS), 2 * table)
    head = model.lm_head
    x = torch.randn(3, 64)
    torch.testing.assert_close(head(x), x @ head.weight.T / 2)


class Ramp:
    """A parametrization in which a bias has a factor of its own."""

    name = "ramp"

    def scale(self, width: optx.scaling.Width, family: str, decay: str) -> Any:
        from optx.scaling._rules_of_width import Scale

        return Scale(forward={"matrix": 0.5, "vector": 3.0, "output": 0.1}.get(width.kind, 1.0))


@pytest.mark.parametrize("conv", [False, True])
def test_a_bias_may_have_a_factor(conv: bool) -> None:
    def make(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        kinds = [nn.Conv1d(2, width, 1), nn.Conv1d(width, width, 1)] if conv else None
        return nn.Sequential(*(kinds or [nn.Linear(2, width), nn.Linear(width, width)]))

    model = make(8).eval()
    x = torch.randn(3, 2, 4) if conv else torch.randn(3, 2)
    shaped = (lambda b: b[:, None]) if conv else (lambda b: b)
    hidden = model[0](x) + 2 * shaped(model[0].bias)
    bias = shaped(model[1].bias)
    reference = (model[1](hidden) - bias) * 0.5 + 3 * bias
    handle = optx.attach(
        model, optx.MuReadout(optx.scaling.shapes(model, base=make(4)), parametrization=Ramp())
    )
    torch.testing.assert_close(model(x), reference)
    handle.merge()
    torch.testing.assert_close(model(x), reference)


def test_the_packages_module_computes_the_same() -> None:
    mup = pytest.importorskip("mup")

    class Theirs(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(6, width), mup.MuReadout(width, 3, output_mult=1.7)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.first(x)))

    theirs = Theirs(40)
    mup.set_base_shapes(theirs, Theirs(8), rescale_params=False)
    ours = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    names = {"first": "0", "out": "2"}
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optx.attach(ours, optx.MuReadout(optx.scaling.shapes(ours, base=base), output_mult=1.7))
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


# ---- as an injection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_compile_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    one: Any = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 1}  # each is traced anew
    model, shapes = widened(kind, **one)
    optx.attach(model, optx.MuReadout(shapes))
    eager = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled), eager)


def test_it_leaves_no_trace_and_no_keys() -> None:
    model, shapes = widened("qwen2")
    before, keys = snapshot(model), list(model.state_dict())
    handle = optx.attach(model, optx.MuReadout(shapes, output_mult=2.0))
    assert list(model.state_dict()) == keys
    model.load_state_dict(built(qwen2(64)).state_dict(), strict=True)
    run(model).sum().backward()
    model.zero_grad()
    assert list(handle.parameters()) == []
    twin = copy.deepcopy(model)
    served = run(model)
    handle.remove()
    assert_same(model, before)
    assert torch.equal(run(twin), served)


def test_gradients_are_those_of_the_products() -> None:
    model, base = mlp(32), mlp(8)
    by_hand = copy.deepcopy(model)
    optx.attach(model, optx.MuReadout(optx.scaling.shapes(model, base=base)))
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    F.linear(by_hand[:3](x) / 4, by_hand[3].weight, by_hand[3].bias).square().sum().backward()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_autocast() -> None:
    model, shapes = widened("llama")
    optx.attach(model, optx.MuReadout(shapes))
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model)
    torch.testing.assert_close(half.float(), run(model), rtol=0.1, atol=0.02)


def test_merging_is_exact_and_says_what_changes() -> None:
    model, shapes = widened("llama")
    weight = model.lm_head.weight.clone()
    handle = optx.attach(model, optx.MuReadout(shapes, output_mult=2.0))
    served = run(model)
    handle.merge()  # in eval mode: for inference
    torch.testing.assert_close(run(model), served)
    assert torch.equal(model.lm_head.weight, weight / 2)
    handle.unmerge()
    assert torch.equal(model.lm_head.weight, weight)
    model.train()
    with pytest.warns(UserWarning, match=r"has its multiplier 0.5 in it now.*Unmerge before training on"):
        handle.merge()
    handle.unmerge()


def test_a_tied_weight_is_merged_into_the_head_alone() -> None:
    model, shapes = widened("gpt2")
    handle = optx.attach(model, optx.MuReadout(shapes))
    served = run(model)
    with pytest.raises(optx.MergeError, match="lm_head"):
        handle.merge()
    handle.merge(untie=True)
    torch.testing.assert_close(run(model), served)
    handle.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(run(model), served)


def test_a_lora_on_the_head_is_multiplied_too() -> None:
    model = mlp(32)
    optx.attach(model, optx.MuReadout(optx.scaling.shapes(model, base=mlp(8))))
    lora = optx.attach(model, optx.LoRA(rank=2), targets="3")
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_()
    x = torch.randn(5, 6)
    served = model(x)
    change = lora.served[0].part.state_dict()
    product = next(v for k, v in change.items() if "B" in k) @ next(v for k, v in change.items() if "A" in k)
    scale = lora.served[0].part.scale
    reference = F.linear(model[:3](x) / 4, model[3].weight + scale * product, model[3].bias)
    torch.testing.assert_close(served, reference)
    lora.merge()
    torch.testing.assert_close(model(x), reference)


def test_a_folder_gives_it_back(tmp_path: Path) -> None:
    model, shapes = widened("bert")
    handle = optx.attach(model, optx.MuReadout(shapes, output_mult=3.0))
    served = run(model)
    handle.save(tmp_path / "readout")
    fresh = built(bert(64))
    again = optx.attach(fresh, tmp_path / "readout")
    assert again.injection == handle.injection
    assert torch.equal(run(fresh), served)


# ---- what it refuses ----------------------------------------------------------------------------------


def test_a_second_multiplier_is_refused() -> None:
    model, shapes = widened("vit")
    optx.attach(model, optx.MuReadout(shapes))
    before = run(model)
    for name in (None, "again"):
        with pytest.raises(optx.TargetError, match=r"'classifier' has a multiplier already \('mu_readout'\)"):
            optx.attach(model, optx.MuReadout(shapes), name=name)
    assert torch.equal(run(model), before)


def test_the_packages_own_readout_is_refused() -> None:
    mup = pytest.importorskip("mup")
    models = [nn.Sequential(nn.Linear(6, width), mup.MuReadout(width, 3)) for width in (32, 8)]
    shapes = optx.scaling.shapes(models[0], base=models[1])
    with pytest.raises(optx.TargetError, match="'1' is the package mup's MuReadout, which has a multiplier"):
        optx.attach(models[0], optx.MuReadout(shapes))


def test_a_hidden_layer_has_no_factor() -> None:
    model = mlp(32)
    injection = optx.MuReadout(optx.scaling.shapes(model, base=mlp(8)))
    with pytest.raises(optx.TargetError, match=r"'2' is 'matrix', for which MuReadout.* has no factor"):
        optx.attach(model, injection, targets="2")


def test_a_readout_that_no_module_calls_is_refused_by_name() -> None:
    class Raw(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(4, width)
            self.experts_down_proj = nn.Parameter(torch.zeros(2, 3, width))

    model = nn.Sequential(Raw(32))
    shapes = optx.scaling.shapes(model, base=nn.Sequential(Raw(8)))
    assert shapes["0.experts_down_proj"].kind == "output"
    with pytest.raises(optx.TargetError, match=r"'0.experts_down_proj' of a Raw has a factor too"):
        optx.attach(model, optx.MuReadout(shapes))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "2"])
def test_an_output_mult_that_is_none(value: Any) -> None:
    shapes = optx.scaling.shapes(mlp(16), base=mlp(8))
    with pytest.raises(optx.OptxError, match="MuReadout: output_mult is"):
        optx.MuReadout(shapes, output_mult=value)


def test_wrong_arguments() -> None:
    shapes = optx.scaling.shapes(mlp(16), base=mlp(8))
    with pytest.raises(optx.OptxError, match="MuReadout: parametrization is 'mu'"):
        optx.MuReadout(shapes, parametrization="mu")
    with pytest.raises(optx.OptxError, match="MuReadout: shapes is a Sequential"):
        optx.MuReadout(mlp(16))  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match=r"this one has '0.weight' of shape \(8, 6\), and they of"):
        optx.attach(mlp(8), optx.MuReadout(shapes))


def test_a_parametrization_without_a_name_is_not_saved(tmp_path: Path) -> None:
    model = mlp(16)
    handle = optx.attach(
        model, optx.MuReadout(optx.scaling.shapes(model, base=mlp(8)), parametrization=Ramp())
    )
    with pytest.raises(optx.OptxError, match="can't be written as JSON"):
        handle.save(tmp_path / "readout")


def test_the_families_here_are_what_is_asked_for() -> None:
    assert {llama, gpt2, vit, t5, mixtral} <= set(FAMILIES.values())
    assert HEADS.keys() == FAMILIES.keys()


@pytest.mark.usefixtures("group_of_one")
def test_under_ddp() -> None:
    """Names are the bare model's, the factors act, and what is attached later is refused."""
    from torch.nn.parallel import DistributedDataParallel

    model, shapes = widened("llama")
    for injection in (optx.MuReadout(shapes), optx.MuAttention(shapes)):
        optx.attach(model, injection)
    alone = run(model)
    parallel = DistributedDataParallel(model)
    torch.testing.assert_close(parallel(TOKENS).logits, alone)
    assert optx.scaling.shapes(parallel, base=llama(16)) == shapes
    shapes.check(parallel)
    parallel(TOKENS).logits.sum().backward()
    with pytest.raises(optx.OptxError, match="attach"):
        optx.attach(parallel, optx.MuReadout(shapes))
