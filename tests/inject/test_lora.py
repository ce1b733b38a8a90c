"""LoRA, rsLoRA and DoRA: their laws, and PEFT's own numbers (arXiv 2106.09685, 2312.03732, 2402.09353)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    assert_close,
    attached,
    bert,
    ids,
    in_peft,
    llama,
    outputs,
    peft_talk,
    plain,
    shake,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import optx

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def conv1d_of_transformers(out: int, into: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, into)


# A module, an input for it, and whether it has a bias.
Draw = tuple[nn.Module, Tensor, bool]


@st.composite
def modules(draw: st.DrawFn) -> Draw:
    """Everything LoRA serves, in odd sizes and every geometry."""
    kind = draw(st.sampled_from(["linear", "conv1d of transformers", "embedding", "conv1", "conv2", "conv3"]))
    into, out, batch = draw(st.integers(2, 7)), draw(st.integers(2, 7)), draw(st.integers(1, 3))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind == "linear":
        return (
            nn.Linear(into, out, bias=bias),
            torch.randn(*draw(st.sampled_from([(), (3,), (2, 3)])), into),
            bias,
        )
    if kind == "conv1d of transformers":
        return conv1d_of_transformers(out, into), torch.randn(batch, 3, into), True
    if kind == "embedding":
        module = nn.Embedding(into, out, padding_idx=draw(st.sampled_from([None, 0])))
        return module, torch.randint(0, into, (batch, 5)), False
    axes = int(kind[-1])
    geometry: dict[str, Any] = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "bias": bias,
    }
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return make(into, out, draw(st.integers(1, 3)), **geometry), torch.randn(batch, into, *(6,) * axes), bias


@settings(max_examples=60)
@given(
    drawn=modules(),
    dtype=st.sampled_from([F32, F64, BF16]),
    alpha=st.floats(0, 8),
    rslora=st.booleans(),
    method=st.sampled_from(["plain", "dora", "lora_bias"]),
    trains_bias=st.booleans(),
    data=st.data(),
)
def test_laws(
    drawn: Draw,
    dtype: torch.dtype,
    alpha: float,
    rslora: bool,
    method: str,
    trains_bias: bool,
    data: st.DataObject,
) -> None:
    """Exactly nothing at the start; merged is attached; unmerged and removed are exactly the base."""
    module, x, has_bias = drawn
    weight: Tensor = module.weight  # type: ignore[assignment]
    embedding = isinstance(module, nn.Embedding)
    rank = data.draw(st.integers(1, min(weight.shape[:2])), label="rank")
    module, x = module.to(dtype), x if embedding else x.to(dtype)
    model = nn.ModuleDict({"it": module})
    base, before = module(x), {k: t.clone() for k, t in model.state_dict().items()}
    options: dict[str, Any] = {
        "dora": method == "dora",
        "lora_bias": method == "lora_bias" and has_bias and not embedding,
        "bias": "lora_only" if trains_bias else "none",
    }
    handle = optx.attach(model, optx.LoRA(rank=rank, alpha=alpha, rslora=rslora, **options), targets="it")
    assert torch.equal(module(x), base)

    shake(handle.parameters(), by=0.2)
    wanted = module(x)
    assert wanted.dtype == dtype
    handle.merge()
    tolerance = {F32: 1e-5, F64: 1e-12, BF16: 0.15}[dtype]
    torch.testing.assert_close(module(x), wanted, rtol=tolerance, atol=tolerance)
    handle.unmerge()
    assert torch.equal(module(x), wanted)
    handle.remove()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


# ---- the formulas, dumb and separate ----------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_is_the_formulas(dora: bool, rslora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=F64)
    handle = attached(model, optx.LoRA(rank=2, alpha=3, rslora=rslora, dora=dora), targets="0")
    part: Any = handle.served[0].part
    linear: Any = model[0]
    V = linear.weight + 3 / (math.sqrt(2) if rslora else 2) * part.B @ part.A
    W = part.magnitude[:, None] * V / V.norm(dim=1, keepdim=True) if dora else V
    assert_close(model(x), x @ W.T + linear.bias, 1e-13)


def test_doras_norm_is_a_constant_in_the_backward_pass() -> None:
    """Section 4.3: gradients reach the magnitude and the numerator, not the norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=F64)
    handle = attached(model, optx.LoRA(rank=2, alpha=3, dora=True), targets="0")
    part: Any = handle.served[0].part
    linear: Any = model[0]
    model(x).square().sum().backward()
    got = [part.A.grad.clone(), part.B.grad.clone(), part.magnitude.grad.clone()]
    handle.model.zero_grad()
    V = linear.weight + 1.5 * part.B @ part.A
    W = part.magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach()
    (x @ W.T + linear.bias).square().sum().backward()
    for one, other in zip(got, [part.A.grad, part.B.grad, part.magnitude.grad], strict=True):
        assert_close(one, other, 1e-12)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "alpha": 8, "rslora": True}, 4.0),
        ({"rank": 2, "alpha": 3}, 1.5),
        ({"rank": 2, "rslora": True, "alpha_pattern": {"fc": 1}}, 1 / math.sqrt(2)),
    ],
)
def test_scales(options: dict[str, Any], scale: float) -> None:
    handle = optx.attach(plain(), optx.LoRA(**options), targets="fc")
    assert handle.served[0].part.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("layers", "widths", "numbers"),
    [
        (12, [(768, 768), (768, 768)], 294_912),  # RoBERTa-base: query, value
        (30, [(576, 576), (576, 192)], 460_800),  # SmolLM2-135M: q_proj, v_proj with grouped heads
    ],
    ids=["RoBERTa-base", "SmolLM2-135M"],
)
def test_numbers_at_rank_eight(layers: int, widths: list[tuple[int, int]], numbers: int) -> None:
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList(nn.Linear(*width) for width in widths) for _ in range(layers))
    assert optx.attach(model, optx.LoRA(rank=8), targets=nn.Linear).report().trainable == numbers


def test_start_is_the_papers() -> None:
    """A uniform in +-1/sqrt(in), B zero; embeddings the other way round, B normal."""
    model = nn.ModuleDict({"fc": nn.Linear(400, 30), "emb": nn.Embedding(40, 300)})
    handle = optx.attach(model, optx.LoRA(rank=20), targets="fc|emb")
    fc, emb = (one.part for one in handle.served)
    assert float(fc.A.detach().abs().max()) == pytest.approx(0.05, rel=0.01)
    assert float(fc.A.detach().std()) == pytest.approx(0.1 / math.sqrt(12), rel=0.05)
    assert not fc.B.any()
    assert not emb.A.any()
    assert float(emb.B.detach().std()) == pytest.approx(1, rel=0.05)


# ---- PEFT's own numbers -----------------------------------------------------------------------------

LORAS = {
    "lora": optx.LoRA(rank=2, dropout=0.4),
    "rslora": optx.LoRA(rank=2, rslora=True, dropout=0.4),
    "lora_bias": optx.LoRA(rank=2, lora_bias=True, dropout=0.4),
    "dora": optx.LoRA(rank=2, dora=True),
    "dora with dropout": optx.LoRA(rank=2, dora=True, dropout=0.4),
}


TOGETHER = r"conv|one|fc|block\.fc"
PLACES = ["fc", "conv", "conv1", "emb", TOGETHER]
# PEFT has no lora_bias for embeddings, and warns where there is no bias to merge it into.
ASKED = [
    (case, place)
    for case in LORAS
    for place in PLACES
    if case != "lora_bias" or place not in ("emb", TOGETHER)
]


@pytest.mark.parametrize(("case", "targets"), ASKED)
def test_outputs_and_gradients_in_training_are_pefts(case: str, targets: str, tmp_path: Path) -> None:
    """From the same seed, with the same dropout."""
    model = plain()
    handle = attached(model, LORAS[case], targets=targets)
    handle.save(tmp_path)
    with peft_talk():
        other = peft.PeftModel.from_pretrained(plain(), tmp_path, is_trainable=True)
    results = []
    for one in (model.train(), other.train()):
        torch.manual_seed(5)
        out = one(ids())
        out.square().sum().backward()
        results.append(out.detach())
    assert_close(*results, 1e-6)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in other.named_parameters()
        if p.requires_grad
    }
    for one in handle.served:
        suffixes = one.part.suffixes()
        for name, p in one.part.named_parameters():
            key = f"{one.path}.{suffixes[name]}"
            grad = theirs[f"{key}.weight" if name == "magnitude" else key]
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_merging_into_half_precision_is_as_exact_as_pefts(
    dora: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama().to(dtype)
    start = copy.deepcopy(model)
    handle = attached(model, optx.LoRA(rank=4, dora=dora), targets=r".*_proj")
    handle.save(tmp_path)
    exact = copy.deepcopy(start).double()
    again = optx.attach(exact, tmp_path)
    again.merge_and_unload()
    with peft_talk():
        other = in_peft(copy.deepcopy(start), tmp_path).merge_and_unload()
    handle.merge_and_unload()
    ours = theirs = worst = 0.0
    for key, wanted in exact.state_dict().items():
        mine = (model.state_dict()[key].double() - wanted).abs()
        ours += float(mine.sum())
        theirs += float((other.state_dict()[key].double() - wanted).abs().sum())
        half_a_step = wanted.abs() * torch.finfo(dtype).eps / 2
        worst = max(worst, float((mine - half_a_step).max()))
    assert ours <= theirs * (1 + 1e-6)  # a tie, where sums in float32 meet a halfway point
    assert worst < 1e-6  # rounded once: no number is further off than half a step


def test_unmerging_is_exact_where_subtracting_is_not() -> None:
    for dtype in (F32, BF16):
        model = llama().to(dtype)
        start = {k: t.clone() for k, t in model.state_dict().items()}
        handle = attached(model, optx.LoRA(rank=4), targets=r".*_proj")
        handle.merge()
        naive = sum(
            int(
                (
                    one.module.weight - one.part.scale * one.part.B @ one.part.A
                    != start[f"{one.path}.weight"]
                ).sum()
            )  # type: ignore[operator]
            for one in handle.served
        )
        assert naive > 100
        handle.unmerge()
        handle.remove()
        assert all(torch.equal(t, start[k]) for k, t in model.state_dict().items())


def test_a_tied_head_merges_alone_or_not_at_all(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    kept = embedding.detach().clone()
    handle = attached(model, optx.LoRA(rank=2), targets="lm_head")
    wanted = outputs(model)
    with pytest.raises(
        optx.MergeError, match=r"lm_head.weight is tied: model.embed_tokens.weight, lm_head.weight"
    ):
        handle.merge()
    assert torch.equal(outputs(model), wanted)
    handle.merge(untie=True)
    assert_close(outputs(model), wanted)
    assert torch.equal(embedding, kept)
    handle.unmerge()
    assert model.lm_head.weight is embedding
    assert torch.equal(outputs(model), wanted)


# ---- DoRA's corners ---------------------------------------------------------------------------------


def test_dora_on_a_row_of_zeros_is_not_nan() -> None:
    """Heads start at zero in many models; PEFT's 0 / 0 makes all outputs NaN."""
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0  # type: ignore[index]
    x = torch.randn(2, 4)
    base = model(x)
    handle = optx.attach(model, optx.LoRA(rank=1, dora=True), targets="0")
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 1), lambda: nn.Embedding(6, 5)]
)
def test_changes_of_a_stack_add_up_and_merge_in_any_order(
    dropout: float, make: Callable[[], nn.Module]
) -> None:
    """Each is a change of the base, DoRA's too: what others add or have merged is nothing to it."""
    torch.manual_seed(0)
    base = make()
    model = nn.Sequential(copy.deepcopy(base))
    x = torch.arange(6) if isinstance(base, nn.Embedding) else torch.randn(3, 6, 6)
    kinds = [optx.LoRA(rank=2), optx.LoRA(rank=2, dora=True, dropout=dropout), optx.LoRA(rank=1, dora=True)]
    handles = [attached(model, kind, targets="0", name=f"number{i}") for i, kind in enumerate(kinds)]

    def run() -> Tensor:
        torch.manual_seed(1)
        return model(x)

    if not dropout:  # it has no equal in weights
        changes = []
        for kind, handle in zip(kinds, handles, strict=True):
            alone = nn.Sequential(copy.deepcopy(base))
            twin = optx.attach(alone, kind, targets="0")
            twin.load_state_dict(handle.state_dict())
            changes.append(twin.merge_and_unload()[0].weight - base.weight)  # type: ignore[index]
        together = copy.deepcopy(base)
        with torch.no_grad():
            together.weight += sum(changes)  # type: ignore[operator]
        assert_close(run(), together(x))
    wanted = run()
    for merged in ([0], [0, 2], [2], [2, 0]) if dropout else itertools.permutations(range(3)):
        for i in merged:
            handles[i].merge()
            assert_close(run(), wanted)
        for i in merged:
            handles[i].unmerge()
            assert_close(run(), wanted)


def test_dora_starts_as_the_identity_on_top_of_a_merged_adapter() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attached(model, optx.LoRA(rank=2), targets="0", name="below").merge()
    x = torch.randn(3, 6)
    base = model(x)
    optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    assert torch.equal(model(x), base)


# ---- modules with ways of their own -----------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_that_scale_their_rows(dora: bool, tmp_path: Path) -> None:
    """Gemma multiplies embeddings by sqrt(d); so must the update be, as merging it would."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5))

    model, x = make(), torch.arange(9)
    base = outputs(model, x)
    handle = attached(model, optx.LoRA(rank=2, dora=dora), targets="0")
    handle.save(tmp_path)
    wanted = outputs(model, x)
    assert (wanted - base).abs().max() > 0.1
    if hasattr(peft.tuners.lora.Embedding, "_get_embed_scale"):  # PEFT 0.17 does not scale the update
        assert_close(outputs(in_peft(make(), tmp_path), x), wanted)
    handle.merge()
    assert_close(outputs(model, x), wanted)


def test_embeddings_keep_their_precision_under_autocast() -> None:
    model = nn.Sequential(nn.Embedding(9, 6))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    x = torch.arange(9)
    with torch.autocast("cpu", BF16):
        assert torch.equal(model(x), model[0].weight)  # type: ignore[arg-type]
    shake(handle.parameters())
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == F32


@pytest.mark.parametrize("rank", [2, 4])
def test_grouped_convolutions_are_pefts(rank: int, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    model, x = make(), torch.randn(2, 4, 5, 5)
    handle = attached(model, optx.LoRA(rank=rank), targets="0")
    handle.save(tmp_path)
    assert_close(outputs(in_peft(make(), tmp_path), x), outputs(model, x))
    before = model[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(optx.MergeError, match=r"convolution with groups=2 mixes channels"):
        handle.merge()
    assert torch.equal(model[0].weight, before)  # type: ignore[arg-type]


def test_biases_are_trained_as_differences() -> None:
    model = bert()
    start = {k: t.clone() for k, t in model.state_dict().items()}
    handle = optx.attach(model, optx.LoRA(rank=2, bias="all"))
    biases = [k for k in start if k.endswith(".bias")]
    shifts = [k for k in handle.state_dict() if k.endswith(("lora_bias_delta", "bitfit.delta"))]
    assert {k.removesuffix(".bias") for k in biases} == {
        k.removesuffix(".lora_bias_delta").removesuffix(".bitfit.delta") for k in shifts
    }
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    outputs_before = outputs(model)
    model(ids()).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), outputs_before)
    handle.merge()
    assert all(not torch.equal(model.state_dict()[k], start[k]) for k in biases if "key" not in k)
    handle.remove()
    assert all(torch.equal(t, start[k]) for k, t in model.state_dict().items())


def test_all_biases_are_the_models_not_another_adapters() -> None:
    model = plain()
    optx.attach(model, optx.LoRA(rank=1, lora_bias=True), targets="fc", name="below")
    handle = optx.attach(model, optx.LoRA(rank=1, bias="all"), targets="fc")
    assert {one.path for one in handle.served} == {"conv1", "conv", "fc", "block.fc", "block.norm", "head"}


# ---- files and training -----------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_a_resumed_run_is_the_same_run(dora: bool, tmp_path: Path) -> None:
    def steps(model: Any, opt: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            model(ids()).logits.square().mean().backward()
            opt.step()
            opt.zero_grad()

    def start() -> tuple[Any, optx.Handle, torch.optim.Optimizer]:
        model = bert().train()
        torch.manual_seed(7)
        lora = optx.LoRA(rank=2, dora=dora, dropout=0.1, bias="all")
        handle = optx.attach(model, lora)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=0.01)

    whole, _, opt = start()
    steps(whole, opt, range(6))
    model, handle, opt = start()
    steps(model, opt, range(3))
    handle.save(tmp_path / "adapter")
    torch.save(opt.state_dict(), tmp_path / "optimizer")

    fresh, again, opt = start()
    again.load(tmp_path / "adapter")
    opt.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    steps(fresh, opt, range(3, 6))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key


def test_it_learns_what_a_low_rank_change_can_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(64, 8)
    target = (x @ (model[0].weight + torch.randn(8, 2) @ torch.randn(2, 8)).T).detach()  # type: ignore[operator]
    handle = optx.attach(model, optx.LoRA(rank=2, alpha=2, bias="lora_only"), targets="0")
    opt = torch.optim.Adam(handle.parameters(), lr=0.03)
    first = F.mse_loss(outputs(model, x), target)
    for _ in range(300):
        opt.zero_grad()
        F.mse_loss(model(x), target).backward()
        opt.step()
    assert F.mse_loss(outputs(model, x), target) < 1e-3 * first


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank is 0; it must be at least 1"),
        ({"rank": 2.5}, r"rank is 2.5; it must be a whole number"),
        ({"rank": "8"}, r"rank is '8'"),
        ({"alpha": -1}, r"alpha is -1"),
        ({"dropout": 1.5}, r"dropout is 1.5; it must be between 0 and 1"),
        ({"bias": "some"}, r"bias is 'some'; it must be 'none', 'lora_only' or 'all'"),
        ({"dora": True, "lora_bias": True}, r"dora=True and lora_bias=True don't go together"),
        ({"rank_pattern": {"fc": 0}}, r"rank_pattern\['fc'\] is 0"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has '\(', not a regular expression"),
        ({"alpha_pattern": {"fc": -2}}, r"alpha_pattern\['fc'\] is -2"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        optx.LoRA(**options)


def learned_positions() -> nn.Module:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    return OPTLearnedPositionalEmbedding(8, 4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(4, 3), {"rank": 4}, r"rank=4 is larger than the weight of '0', \(3, 4\)"),
        (lambda: nn.LayerNorm(4), {"rank": 1}, r"LoRA serves Linear, .*'0' is a LayerNorm"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), {"rank": 1}, r"Embedding with max_norm"),
        (
            learned_positions,
            {"rank": 1},
            r"LearnedPositionalEmbedding that looks up rows in a way of its own",
        ),
        (lambda: nn.Embedding(4, 4), {"rank": 1, "lora_bias": True}, r"lora_bias=True is not for embeddings"),
        (lambda: nn.Conv1d(4, 4, 1, groups=2), {"rank": 3}, r"groups=2; LoRA's rank=3 must be a multiple"),
        (lambda: nn.Conv1d(4, 4, 1, groups=2), {"rank": 2, "dora": True}, r"groups=2; DoRA has no norm"),
    ],
)
def test_modules_it_cannot_serve(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(make())
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, optx.LoRA(**options), targets="0")
    assert "optx" not in dict(model[0].named_children())


def test_a_rank_above_the_matrix_must_name_the_module() -> None:
    """PEFT's files have such ranks, where one rank is for all."""
    model = nn.Sequential(nn.Linear(4, 3))
    handle = optx.attach(model, optx.LoRA(rank=1, rank_pattern={"^0": 5}), targets="0")
    assert handle.served[0].part.A.shape == (5, 4)


def test_a_pattern_that_names_nothing_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"rank_pattern has 'q_prj', which matches none of the served modules"
    ):
        optx.attach(plain(), optx.LoRA(rank=1, rank_pattern={"q_prj": 2}), targets="fc")
