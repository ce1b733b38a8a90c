"""FLoRA's laws (arXiv 2405.14739), the numbered properties of its specification first."""

from __future__ import annotations

import copy
import math
import string
import warnings
from typing import Any

import pytest
import torch
from adapter_models import llama, move, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from weight_modules import MODULES, TOKENS, resnet, serve

import optx
from optx import FLoRA

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def explicit(part: Any) -> Tensor:
    """s * sum over all j of G[j] prod U_n[i_n, j_n], axes as in the core, by one einsum."""
    n = part.core.ndim
    small, large = string.ascii_lowercase[:n], string.ascii_uppercase[:n]
    terms = ",".join([small, *(f"{i}{j}" for i, j in zip(large, small, strict=True))])
    return part.scale * torch.einsum(
        f"{terms}->{large}", part.core.detach(), *map(Tensor.detach, part.factors)
    )


def in_first(part: Any, weight: Tensor) -> Tensor:
    return weight if part.transposed else weight.transpose(0, 1)


# ---- 1 to 8: the specification's properties ------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_starts_as_the_identity_and_merges(kind: str, dtype: torch.dtype) -> None:
    build, x = MODULES[kind]
    x = x.to(dtype) if x.is_floating_point() else x
    torch.manual_seed(0)
    model = nn.Sequential(build().to(dtype))
    before, weights = model(x), copy.deepcopy(model.state_dict())
    with optx.attach(model, FLoRA(rank=2, scale=0.25), targets="0") as handle:
        assert {p.dtype for p in handle.parameters()} == {F32 if dtype == BF16 else dtype}
        assert torch.equal(model(x), before)
        model(x).square().sum().backward()
        part = part_of(handle)
        assert all(torch.equal(U.grad, torch.zeros_like(U)) for U in part.factors)
        assert part.core.grad.abs().max() > 1e-3
        move(handle)
        tuned = model(x)
        assert (tuned - before).abs().max() > 0.01
        handle.merge()
        torch.testing.assert_close(model(x), tuned, rtol=0, atol={F64: 1e-13, F32: 1e-5, BF16: 0.05}[dtype])
        handle.unmerge()
        assert torch.equal(model(x), tuned)
    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))


@settings(max_examples=60)
@given(
    axes=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    share=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    dtype=st.sampled_from([F64, F32]),
    scale=st.floats(0.04, 4),
    init=st.sampled_from(["kaiming_rank", "orthonormal"]),
    seed=st.integers(0, 2**16),
)
def test_the_change_is_the_tucker_product(
    axes: list[int], share: list[float], dtype: torch.dtype, scale: float, init: Any, seed: int
) -> None:
    """Against the explicit sum and tensorly, with unequal ranks; each unfolding has at most its rank."""
    import tensorly
    from tensorly.tucker_tensor import tucker_to_tensor

    into, out, *kernel = axes
    top = [min(n, math.prod(axes) // n) for n in axes[:2]] + kernel
    ranks = [1 + math.floor(s * (n - 1)) for s, n in zip(share, top, strict=False)]
    torch.manual_seed(seed)
    module = (
        CONVS[len(kernel) - 1](into, out, kernel, dtype=dtype)
        if kernel
        else nn.Linear(into, out, dtype=dtype)
    )
    injection = FLoRA(
        in_rank=ranks[0], out_rank=ranks[1], kernel_rank=tuple(ranks[2:]) or None, scale=scale, init=init
    )
    model, handle = serve(module, injection, 0.5)
    part = part_of(handle)
    assert list(part.core.shape) == ranks
    change = in_first(part, part.delta(dtype).detach())
    atol = (1e-12 if dtype == F64 else 1e-5) * max(1.0, float(change.abs().max()))
    torch.testing.assert_close(change, explicit(part), rtol=0, atol=atol)
    with tensorly.backend_context("pytorch"):
        theirs = tucker_to_tensor((part.core.detach(), [U.detach() for U in part.factors]))
    torch.testing.assert_close(change, scale * theirs, rtol=0, atol=atol)
    for n, rank in enumerate(ranks):
        unfolded = change.movedim(n, 0).flatten(1)
        assert int(torch.linalg.matrix_rank(unfolded.double(), rtol=1e-5)) <= rank
    A, B, lora_scale = part.as_lora()
    assert len(A) == B.shape[1] <= max(ranks[:2])
    flat = part.delta(dtype).detach().flatten(1)
    torch.testing.assert_close(lora_scale * B.detach() @ A, flat, rtol=0, atol=atol)
    x = torch.randn(2, into, *(n + 1 for n in kernel), dtype=dtype)
    tuned = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), tuned, rtol=0, atol=atol * 10 * math.prod(axes))


def test_linear_with_the_identity_core_is_lora() -> None:
    torch.manual_seed(0)
    model, handle = serve(nn.Linear(12, 9, dtype=F64), FLoRA(rank=4, scale=0.7))
    part = part_of(handle)
    with torch.no_grad():
        part.core.copy_(torch.eye(4))
    twin = nn.Sequential(nn.Linear(12, 9, dtype=F64))
    twin[0].weight, twin[0].bias = model[0].weight, model[0].bias
    lora = optx.attach(twin, optx.LoRA(rank=4, alpha=4 * 0.7), targets="0")
    with torch.no_grad():
        part_of(lora).A.copy_(part.factors[0].t())
        part_of(lora).B.copy_(part.factors[1])
    x = torch.randn(5, 12, dtype=F64)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-13)
    handle.merge()
    merged = model[0].weight.detach().clone()
    handle.unmerge()
    lora.merge()
    torch.testing.assert_close(merged, twin[0].weight.detach(), rtol=0, atol=1e-14)


def test_full_ranks_reach_any_change() -> None:
    """Identity factors: dW = s G. tensorly's HOSVD of any tensor, put in the parameters, is it."""
    import tensorly
    from tensorly.decomposition import tucker

    torch.manual_seed(0)
    model, handle = serve(nn.Conv2d(5, 6, 3, dtype=F64), FLoRA(in_rank=5, out_rank=6, scale=0.5))
    part, wanted = part_of(handle), torch.randn(6, 5, 3, 3, dtype=F64)
    with torch.no_grad():
        for U in part.factors:
            U.copy_(torch.eye(len(U)))
        part.core.copy_(wanted.transpose(0, 1))
    torch.testing.assert_close(part.delta(F64), 0.5 * wanted, rtol=0, atol=1e-15)
    with tensorly.backend_context("pytorch"):
        core, factors = tucker(wanted.transpose(0, 1).contiguous(), rank=[5, 6, 3, 3])
    with torch.no_grad():
        part.core.copy_(core / part.scale)
        for U, found in zip(part.factors, factors, strict=True):
            U.copy_(found)
    torch.testing.assert_close(part.delta(F64), wanted, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, 7, 7, dtype=F64)
    dense = F.conv2d(x, model[0].weight + wanted, model[0].bias)
    torch.testing.assert_close(model(x), dense, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(
    dims=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**16),
)
def test_convolutions_are_those_with_the_changed_kernel(
    dims: int, stride: int, dilation: int, padding: Any, mode: Any, groups: int, seed: int
) -> None:
    stride = 1 if padding == "same" else stride
    torch.manual_seed(seed)
    module = CONVS[dims - 1](4, 8, 3, stride, padding, dilation, groups, padding_mode=mode, dtype=F64)
    model, handle = serve(module, FLoRA(in_rank=1, out_rank=3, kernel_rank=2, scale=2.0), 0.5)
    x = torch.randn(2, 4, *[6] * dims, dtype=F64)
    changed = copy.deepcopy(model[0])
    with torch.no_grad():
        changed.weight.add_(in_first(part_of(handle), explicit(part_of(handle))))
    bare = changed.forward(x)  # past the hooks
    torch.testing.assert_close(model(x), bare, rtol=0, atol=1e-12)
    assert not torch.allclose(model(x), model[0].forward(x), atol=1e-3)


def test_numbers() -> None:
    model, handle = serve(nn.Conv2d(64, 128, 3), FLoRA(rank=8))
    assert handle.report().trainable == 8 * 8 * 3 * 3 + 64 * 8 + 128 * 8 + 9 + 9 == 2_130
    lora = optx.attach(model, optx.LoRA(rank=3), targets="0")
    assert lora.report().trainable == 2_112
    _, handle = serve(nn.Linear(20, 30), FLoRA(in_rank=4, out_rank=6))
    assert handle.report().trainable == 4 * 6 + 20 * 4 + 30 * 6


def test_as_lora_takes_the_smaller_rank() -> None:
    for in_rank, out_rank in ((2, 4), (4, 2), (3, 3)):
        _, handle = serve(
            nn.Linear(7, 5, dtype=F64), FLoRA(in_rank=in_rank, out_rank=out_rank, scale=0.5), 0.3
        )
        A, B, scale = part_of(handle).as_lora()
        assert (A.shape, B.shape) == ((min(in_rank, out_rank), 7), (5, min(in_rank, out_rank)))
        torch.testing.assert_close(scale * B @ A, part_of(handle).delta(F64).detach(), rtol=0, atol=1e-14)


# ---- start ---------------------------------------------------------------------------------------------


def test_factors_start_with_a_variance_of_half_over_rank() -> None:
    """The fan of the official start is the rank, not the width."""
    torch.manual_seed(0)
    _, handle = serve(nn.Linear(20_000, 30, bias=False), FLoRA(rank=16))
    U_in = part_of(handle).factors[0].detach()
    assert U_in.var().item() == pytest.approx(0.5 / 16, rel=0.02)
    assert abs(U_in.mean().item()) < 0.002


def test_orthonormal_start() -> None:
    torch.manual_seed(0)
    _, handle = serve(nn.Conv2d(12, 10, 3), FLoRA(rank=4, kernel_rank=2, scale=3.0, init="orthonormal"))
    part = part_of(handle)
    for U in part.factors:
        torch.testing.assert_close(U.t() @ U, torch.eye(U.shape[1]), rtol=0, atol=1e-6)
    with torch.no_grad():
        part.core.normal_()
        torch.testing.assert_close(part.delta(F32).norm(), 3.0 * part.core.norm(), rtol=1e-5, atol=0)


def test_the_cores_gradient_is_the_dense_one_seen_from_the_factors() -> None:
    """Second half of property 1: dL/dG = s (dL/dW) x_n U_n^T."""
    for kind in ("linear", "conv2d", "conv2d in groups", "embedding"):
        build, x = MODULES[kind]
        x = x.double() if x.is_floating_point() else x
        torch.manual_seed(0)
        model, handle = serve(build().double(), FLoRA(rank=2, scale=1.5))
        model(x).sin().sum().backward()
        part = part_of(handle)
        small, large = "abcd"[: part.core.ndim], "ABCD"[: part.core.ndim]
        terms = ",".join([large, *(f"{i}{j}" for i, j in zip(large, small, strict=True))])
        dense = in_first(part, model[0].weight.grad)
        wanted = 1.5 * torch.einsum(f"{terms}->{small}", dense, *part.factors)
        torch.testing.assert_close(part.core.grad, wanted.detach(), rtol=0, atol=1e-11)


def test_padding_of_an_embedding_stays_what_it_is() -> None:
    build, _ = MODULES["embedding"]
    model, handle = serve(build(), FLoRA(rank=2))
    opt = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(3):
        model(TOKENS).cos().sum().backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model(torch.tensor([3])), torch.zeros(1, 6))
    assert model(torch.tensor([4])).sub(model[0].weight[4]).abs().max() > 1e-3


# ---- ranks ---------------------------------------------------------------------------------------------


def test_ranks_above_a_short_axis_are_lowered_with_one_warning() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 7, groups=16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 5)
    )
    with pytest.warns(UserWarning, match=r"'0' \(3, 8, 3, 3\), '1' \(1, 8, 4, 4\), '2'") as caught:
        handle = optx.attach(model, FLoRA(rank=8, kernel_rank=4), targets=nn.Conv2d)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    shapes = [tuple(one.part.core.shape) for one in handle.served]  # pyright: ignore
    assert shapes == [(3, 8, 3, 3), (1, 8, 4, 4), (8, 8, 1, 1), (8, 8, 4, 4)]
    handle.remove()
    with pytest.warns(UserWarning, match=r"FLoRA\(kernel_rank=9\).* and 1 more\."):
        optx.attach(model, FLoRA(kernel_rank=9), targets=nn.Conv2d)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(4, 9), {"rank": 5}, "rank=5 is larger than the rank of '0' along its input axis, 4"),
        (nn.Linear(9, 4), {"rank": 5}, "rank=5 .* input axis, 4"),
        (nn.Linear(9, 4), {"rank": 2, "in_rank": 9}, "in_rank=9 .* input axis, 4"),
        (nn.Conv2d(8, 4, 3), {"rank": 5}, "rank=5 .* output axis, 4"),
        (nn.Conv2d(1, 32, 3), {"rank": 1, "out_rank": 10}, "out_rank=10 .* output axis, 9"),
        (nn.Embedding(9, 4), {"rank": 5}, "rank=5"),
        (nn.Conv2d(8, 8, 3), {"rank": 2, "kernel_rank": (2,)}, r"kernel_rank=\(2,\) has 1 axes, .* has 2"),
        (nn.LayerNorm(4), {}, "'0' is a LayerNorm"),
        (nn.Embedding(9, 4, max_norm=1.0), {"rank": 2}, "Embedding with max_norm"),
        (nn.ConvTranspose2d(4, 4, 3), {"rank": 2}, "ConvTranspose2d"),
    ],
    ids=range(10),
)
def test_modules_it_cannot_serve(module: nn.Module, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(module, nn.Linear(64, 64))
    keys = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, FLoRA(**options), targets="0|1")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"kernel_rank": 0}, "kernel_rank is 0"),
        ({"kernel_rank": (3, 0)}, "kernel_rank is 0"),
        ({"out_rank": 0}, "out_rank is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"init": "zeros"}, "init is 'zeros'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        FLoRA(**options)


def test_default_targets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convolutions = optx.attach(resnet(), FLoRA())
        linears = optx.attach(llama(), FLoRA())
    assert [one.path for one in convolutions.served] == [
        f"layer{i}.0.{name}" for i in (1, 2) for name in ("conv1", "conv2", "downsample.0")
    ]
    assert len(linears) == 14


def test_options_come_back_from_a_file() -> None:
    import json

    injection = FLoRA(rank=4, kernel_rank=(2, 3), init="orthonormal")
    assert FLoRA.from_options(json.loads(json.dumps(injection.options()))) == injection
