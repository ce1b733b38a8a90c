"""SVFit's laws (arXiv 2409.05926), the numbered properties of its specification first."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import gpt2, llama, move, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from weight_modules import IMAGES, MODULES, TOKENS

import optx
from optx import SVFit

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def linear(
    into: int = 7, out: int = 5, dtype: torch.dtype = F64, bias: bool = True, rank: int | None = None
) -> tuple[nn.Sequential, optx.Handle]:
    model = nn.Sequential(nn.Linear(into, out, bias=bias, dtype=dtype))
    return model, optx.attach(model, SVFit(rank=rank), targets="0")


def effective(handle: optx.Handle) -> Tensor:
    """The weight that the merged module has, as (out, in)."""
    handle.merge()
    module: Any = handle.served[0].module
    weight = part_of(handle).matrix(module.weight.detach().clone())
    handle.unmerge()
    return weight


# ---- 1 to 8: the specification's properties ------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_starts_as_the_identity_and_merges(kind: str, dtype: torch.dtype) -> None:
    build, x = MODULES[kind]
    x = x.to(dtype) if x.is_floating_point() else x
    torch.manual_seed(0)
    model = nn.Sequential(build().to(dtype))
    before, weights = model(x), copy.deepcopy(model.state_dict())
    with optx.attach(model, SVFit(rank=3), targets="0") as handle:
        assert torch.equal(model(x), before)
        assert part_of(handle).delta(dtype).abs().max() == 0
        move(handle)
        tuned = model(x)
        assert (tuned - before).abs().max() > 0.02
        handle.merge()
        torch.testing.assert_close(model(x), tuned, rtol=0, atol={F64: 1e-13, F32: 1e-6, BF16: 0.03}[dtype])
        handle.unmerge()
        assert torch.equal(model(x), tuned)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))


def test_transformers_conv1d() -> None:
    model = gpt2()
    before = model(TOKENS).logits
    handle = optx.attach(model, SVFit())
    assert [one.path.rpartition(".")[2] for one in handle.served] == ["c_attn", "c_attn"]
    assert part_of(handle).U.shape == (48, 16)
    assert torch.equal(model(TOKENS).logits, before)
    move(handle, 1.0)
    tuned = model(TOKENS).logits
    assert (tuned - before).abs().max() > 1e-3
    handle.merge()
    torch.testing.assert_close(model(TOKENS).logits, tuned, rtol=0, atol=1e-5)


def test_default_targets_are_query_and_value() -> None:
    model = llama()
    handle = optx.attach(model, SVFit())
    assert {one.path.rpartition(".")[2] for one in handle.served} == {"q_proj", "v_proj"}
    assert len(handle) == 4


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups", "conv3d", "embedding"])
def test_a_step_is_the_dense_gradient_seen_from_the_singular_vectors(kind: str) -> None:
    """sigma_i goes to sigma_i - lr u_i^T G v_i, where G is autograd's gradient of the dense weight."""
    build, x = MODULES[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build().double())
    x = x.double() if x.is_floating_point() else x
    target = torch.randn_like(model(x))
    F.mse_loss(model(x), target, reduction="sum").backward()
    dense = model[0].weight.grad.clone()
    handle = optx.attach(model, SVFit(), targets="0")
    part = part_of(handle)
    opt = torch.optim.SGD(handle.parameters(), lr=1e-3)
    F.mse_loss(model(x), target, reduction="sum").backward()
    opt.step()
    wanted = part.sigma0 - 1e-3 * torch.einsum("or,oi,ri->r", part.U, part.matrix(dense), part.V)
    assert (part.sigma - part.sigma0).abs().max() > 1e-3
    torch.testing.assert_close(part.sigma.detach(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("c", [2.5, -1.0, 0.0])
def test_scaling_every_value_scales_the_weight(c: float) -> None:
    model, handle = linear()
    part = part_of(handle)
    with torch.no_grad():
        part.shift.copy_((c - 1) * part.sigma0)
    torch.testing.assert_close(effective(handle), c * model[0].weight.detach(), rtol=0, atol=1e-13)


def test_values_at_zero_leave_the_best_error_of_that_rank() -> None:
    model, handle = linear(rank=2)
    all_values = torch.linalg.svdvals(model[0].weight.detach())
    part = part_of(handle)
    with torch.no_grad():
        part.shift.copy_(-part.sigma0)
    rest = effective(handle)
    assert float(rest.square().sum()) == pytest.approx(float(all_values[2:].square().sum()), rel=1e-12)


@settings(max_examples=40)
@given(
    into=st.integers(1, 9),
    out=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-3, 10),
    dtype=st.sampled_from([F64, F32]),
)
def test_singular_values_and_span_of_the_change(
    into: int, out: int, share: float, seed: int, scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    k = min(into, out)
    rank = 1 + math.floor(share * (k - 1))
    model, handle = linear(into, out, dtype, rank=rank)
    weight = model[0].weight.detach().clone()
    move(handle, scale, seed)
    part = part_of(handle)
    change, shift = part.delta(dtype).detach(), (part.sigma - part.sigma0).detach()
    atol = (1e-12 if dtype == F64 else 1e-5) * max(1.0, scale)
    assert float(change.norm()) == pytest.approx(float(shift.norm()), abs=atol)
    U, V = part.U.double(), part.V.double()
    for leak in (change - U @ (U.T @ change.double()), change - (change.double() @ V.T) @ V):
        assert float(leak.abs().max()) <= atol  # nothing outside the spans of U and V
    values = torch.linalg.svdvals(effective(handle))
    untrained = torch.linalg.svdvals(weight)[rank:]
    wanted = torch.cat([part.sigma.detach().abs(), untrained]).sort(descending=True).values
    torch.testing.assert_close(values, wanted, rtol=0, atol=4 * atol)
    x = torch.randn(3, into, dtype=dtype)
    tuned = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), tuned, rtol=0, atol=20 * atol)
    handle.remove()
    assert torch.equal(model[0].weight, weight)


def test_directions_below_the_rank_never_move() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False, dtype=F64))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([5.0, 3.0, 1.0])))
    handle = optx.attach(model, SVFit(rank=2), targets="0")
    opt = torch.optim.AdamW(handle.parameters(), lr=0.1)
    for step in range(10):
        torch.manual_seed(step)
        model(torch.randn(8, 3, dtype=F64)).sin().sum().backward()
        opt.step()
        opt.zero_grad()
    weight = effective(handle)
    assert float(weight[2, 2]) == 1.0
    assert torch.equal(weight - torch.diag(weight.diagonal()), torch.zeros(3, 3, dtype=F64))
    assert float((weight.diagonal()[:2] - torch.tensor([5.0, 3.0])).abs().min()) > 0.1


def test_numbers_of_roberta_base() -> None:
    """The claim of 16 times fewer: all 768 values of q and v in each of 12 layers, beside LoRA of rank 8."""
    from transformers import RobertaConfig, RobertaModel

    counts = []
    for injection in (SVFit(rank=768), optx.LoRA(rank=8)):
        model = RobertaModel(RobertaConfig(vocab_size=64, intermediate_size=8, num_hidden_layers=1))
        counts.append(12 * optx.attach(model, injection).report().trainable)
    assert counts == [18_432, 294_912]
    assert counts[1] == 16 * counts[0]


def test_what_is_trained_and_what_is_stored() -> None:
    _, handle = linear(7, 5, rank=3)
    assert [name for name, _ in handle.named_parameters()] == ["0.optx.svfit.shift"]
    row = handle.report().rows[0]
    assert (row.trainable, row.stored, row.note) == (3, 3 + 3 + 3 * (7 + 5), "3 of 5 singular values")
    assert list(handle.state_dict()) == [f"0.svfit.{name}" for name in ("shift", "sigma0", "U", "V")]


def test_as_lora_is_the_same_change() -> None:
    model, handle = linear(7, 5, rank=3)
    move(handle)
    part = part_of(handle)
    A, B, scale = part.as_lora()
    assert (A.shape, B.shape) == ((3, 7), (5, 3))
    torch.testing.assert_close(scale * B @ A, part.delta(F64), rtol=0, atol=1e-14)
    values = torch.linalg.svdvals(effective(handle))
    known = part.sigma.detach().abs()
    assert all(float((values - v).abs().min()) < 1e-12 for v in known)
    assert model[0].weight.shape == (5, 7)


# ---- rank by energy ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(energy=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_energy_takes_the_smallest_rank_that_has_it(energy: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 6, dtype=F64))
    handle = optx.attach(model, SVFit(energy=energy), targets="0")
    square = torch.linalg.svdvals(model[0].weight.detach()).square()
    rank, shares = len(part_of(handle).sigma), square.cumsum(0) / square.sum()
    assert shares[rank - 1] >= energy - 1e-14
    assert rank == 1 or shares[rank - 2] < energy + 1e-14


def test_energy_of_special_weights() -> None:
    def rank_for(values: list[float], energy: float) -> int:
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.diag(torch.tensor(values)))
        return len(part_of(optx.attach(model, SVFit(energy=energy), targets="0")).sigma)

    assert rank_for([3.0, 4.0, 0.0, 0.0], 0.64) == 1  # 16 / 25: squares, not values
    assert rank_for([3.0, 4.0, 0.0, 0.0], 0.65) == 2
    assert rank_for([3.0, 4.0, 0.0, 0.0], 1.0) == 2
    assert rank_for([1.0, 1.0, 1.0, 1.0], 1.0) == 4
    assert rank_for([0.0, 0.0, 0.0, 0.0], 0.9) == 1


# ---- training and state --------------------------------------------------------------------------------


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()  # pyright: ignore[reportCallIssue]
        opt.step()
        opt.zero_grad()


def test_weight_decay_pulls_towards_the_pretrained_weight() -> None:
    model, handle = linear()
    pretrained = model[0].weight.detach().clone()
    opt = torch.optim.AdamW(handle.parameters(), lr=0.1, weight_decay=0.5)
    for grad in (1.0, 0.0):  # nothing moves the weight but decay
        part_of(handle).shift.grad = torch.zeros(5, dtype=F64)
        with torch.no_grad():
            part_of(handle).shift.copy_(torch.full((5,), grad))
        opt.step()
    assert torch.equal(effective(handle), pretrained)
    with torch.no_grad():
        part_of(handle).shift.fill_(1.0)
    part_of(handle).shift.grad = torch.zeros(5, dtype=F64)
    opt.step()
    torch.testing.assert_close(part_of(handle).shift.detach(), torch.full((5,), 0.95, dtype=F64))


def test_state_goes_to_a_fresh_model_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, optx.Handle, torch.optim.Optimizer]:
        model = llama()
        handle = optx.attach(model, SVFit(rank=5), targets=r".*\.(q|v)_proj")
        optx.trainable_only(model, handle)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2)

    whole, _, opt = start()
    train(whole, opt, range(6))
    first, handle, opt = start()
    train(first, opt, range(3))
    torch.save({"adapter": handle.state_dict(), "opt": opt.state_dict()}, tmp_path / "half.pt")
    second, other, opt = start()
    for name in ("U", "V"):  # as another machine's SVD has it
        setattr(part_of(other), name, -getattr(part_of(other), name))
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(saved["adapter"])
    assert torch.equal(second(TOKENS).logits, first(TOKENS).logits)
    opt.load_state_dict(saved["opt"])
    train(second, opt, range(3, 6))
    assert torch.equal(second(TOKENS).logits, whole(TOKENS).logits)
    assert not torch.equal(second(TOKENS).logits, first(TOKENS).logits)


def test_it_trains() -> None:
    model = llama()
    handle = optx.attach(model, SVFit())
    optx.trainable_only(model, handle)
    opt = torch.optim.AdamW(handle.parameters(), lr=0.1)
    before = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    for _ in range(15):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        opt.step()
        opt.zero_grad()
    assert model(input_ids=TOKENS, labels=TOKENS).loss.item() < before - 0.01


# ---- where a model goes --------------------------------------------------------------------------------


def test_bf16_weights() -> None:
    """U and V in the weight's dtype, values in float32, the SVD of the rounded weight in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, dtype=BF16))
    handle = optx.attach(model, SVFit(), targets="0")
    part = part_of(handle)
    assert (part.U.dtype, part.V.dtype, part.sigma.dtype) == (BF16, BF16, F32)
    torch.testing.assert_close(part.sigma0, torch.linalg.svdvals(model[0].weight.detach().float()))
    move(handle, 1e-4)  # far below bf16's steps at these values
    assert float(part.delta(F32).detach().norm()) == pytest.approx(
        float(part.shift.detach().norm()), rel=2e-2
    )


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups", "embedding"])
def test_bf16_autocast(kind: str) -> None:
    build, x = MODULES[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build())
    handle = optx.attach(model, SVFit(), targets="0")
    with torch.autocast("cpu", BF16):
        bare = model[0].forward(x)
        assert torch.equal(model(x), bare)
    move(handle)
    with torch.autocast("cpu", BF16):
        low = model(x)
        assert low.dtype == bare.dtype
        low.float().square().sum().backward()
    full = model(x).detach()
    torch.testing.assert_close(low.float(), full, rtol=0, atol=0.03 * full.abs().max().item())
    assert part_of(handle).shift.grad.abs().max() > 0


def scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(64, 6, 0, embed_scale=3.0)


def test_embeddings_that_scale_their_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(scaled_embedding())
    handle = optx.attach(model, SVFit(), targets="0")
    move(handle)
    tuned = model(TOKENS)
    handle.merge()
    torch.testing.assert_close(model(TOKENS), tuned, rtol=0, atol=1e-5)


def test_a_merged_weight_is_not_taken_for_the_pretrained_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    values = torch.linalg.svdvals(model[0].weight.detach())
    other = optx.attach(model, optx.LoRA(rank=2), targets="0")
    move(other)
    other.merge()
    part = part_of(optx.attach(model, SVFit(), targets="0"))
    torch.testing.assert_close(part.sigma0, values, rtol=0, atol=1e-6)


@pytest.mark.long
def test_compiles_in_one_graph() -> None:
    for build, x, targets in (
        (lambda: llama(use_cache=False), TOKENS, None),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), IMAGES, nn.Conv2d),
    ):
        torch.manual_seed(0)
        model: Any = build()
        handle = optx.attach(model, SVFit(rank=3), targets=targets)
        move(handle)
        plain = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        plain, compiled = (getattr(out, "logits", out) for out in (plain, compiled))
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(out.square().mean(), handle.parameters()) for out in (plain, compiled)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
        torch._dynamo.reset()


def test_activation_checkpointing_deepcopy_pickle_and_functional_call() -> None:
    model, handle = linear(16, 16, F32, rank=4)
    move(handle)
    x = torch.randn(3, 16, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *handle.parameters()])
    again: Any = checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(again.square().sum(), [x, *handle.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin[0].optx.svfit.shift.zero_()
        assert not torch.equal(twin(x), model(x))
    bare = F.linear(x, model[0].weight, model[0].bias)
    start = {"0.optx.svfit.shift": torch.zeros(4)}
    assert torch.equal(torch.func.functional_call(model, start, (x,)), bare)


def test_saves_fewer_activations_than_a_trained_weight() -> None:
    """The frozen V needs no input kept, only V x."""
    model, handle = linear(512, 32, F32, rank=4)
    optx.trainable_only(model, handle)
    kept: list[int] = []
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(64, 512))
    assert sum(kept) <= 64 * 4 * 2


# ---- what it refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"rank": 3, "energy": 0.9}, "Give one"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        SVFit(**options)


def spoiled(module: Any) -> nn.Module:
    module.weight.data[0] = math.nan
    return module


@pytest.mark.parametrize(
    ("module", "injection", "message"),
    [
        (nn.Linear(4, 3), SVFit(rank=4), r"rank=4 is larger than .* of '0', 3"),
        (nn.LayerNorm(4), SVFit(), "'0' is a LayerNorm"),
        (nn.Embedding(9, 4, max_norm=1.0), SVFit(), "Embedding with max_norm"),
        (nn.ConvTranspose2d(4, 4, 3), SVFit(), "ConvTranspose2d"),
        (nn.Linear(4, 3, device="meta"), SVFit(energy=0.9), "meta device"),
        (spoiled(nn.Linear(4, 3)), SVFit(), "0.weight is not finite"),
        (nn.Linear(4, 3).requires_grad_(False), SVFit(), None),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_modules_it_cannot_serve(module: nn.Module, injection: SVFit, message: str | None) -> None:
    model = nn.Sequential(module, nn.Linear(4, 4))
    keys = list(model.state_dict())
    if message is None:
        optx.attach(model, injection, targets="0").remove()
    else:
        with pytest.raises(optx.TargetError, match=message):
            optx.attach(model, injection, targets="0|1")
    assert list(model.state_dict()) == keys


def test_quantized_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(optx.TargetError, match=r"the weight of '0' is int8 codes"):
        optx.attach(model, SVFit(), targets="0")
