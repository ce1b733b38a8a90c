"""LoRA, rsLoRA and DoRA: their laws and formulas (arXiv 2106.09685, 2312.03732, 2402.09353)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_close, attached, bert, ids, outputs, plain, shake
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
