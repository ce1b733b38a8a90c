"""What a rule means in generated Triton code, and how results are rounded: against torch."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from harness import Bucket, Setup
from torch import Tensor

from optx._rules import rule
from optx.kernels import triton_lib as lib
from optx.kernels.step.emit_triton import FOLD_LANES
from optx.kernels.step.triton import TritonStep
from optx.ops import abs, exp, fast_power, log, maximum, minimum, sign, sqrt, where
from optx.step.transform import Transform

HALF, RATE = 0.5, 0.1


@triton.jit
def _round_kernel(x, random, near, dither, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(near + i, lib.nearest(value))
    tl.store(dither + i, lib.dithered(value, tl.load(random + i).to(tl.uint32)))


@triton.jit
def _power_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, lib.power(tl.load(x + i), tl.load(y + i)))


@triton.jit
def _bits_kernel(out, key, start, step, tensor, ROLE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    bits = lib.random_bits(tl.load(key), tl.load(start), lane, tl.load(step), tl.load(tensor), ROLE)
    tl.store(out + lane, bits.to(tl.int32))


def rounded(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    near, dither = (torch.zeros(len(x), dtype=torch.uint16) for _ in range(2))
    _round_kernel[(len(x) // 4096,)](x, random, near, dither, BLOCK=4096)
    return near.view(torch.bfloat16), dither.view(torch.bfloat16)


def all_halves(top: float) -> Tensor:
    """The float32 numbers that share ``top``'s upper half."""
    bits = torch.tensor([top]).view(torch.int32)
    return ((bits & ~0xFFFF) + torch.arange(65536, dtype=torch.int32)).view(torch.float32)


@pytest.mark.parametrize("top", [1.0, -3.5, 1e-40, 3.38e38, 0.0, float("inf"), float("nan")])
def test_nearest_is_torchs_rounding(top: float) -> None:
    x = all_halves(top)
    near, _ = rounded(x, torch.zeros(65536, dtype=torch.int32))
    assert torch.equal(near.isnan(), x.isnan())
    assert torch.equal(near.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("lower", [0, 1, 0x4000, 0x8000, 0xFFFF])
def test_dithering_is_exactly_unbiased(lower: int) -> None:
    """Over all 65536 random numbers, exactly ``lower`` of them round up, and only neighbours occur."""
    x = all_halves(1.5)[lower].expand(65536).contiguous()
    _, result = rounded(x, torch.arange(65536, dtype=torch.int32))
    below, above = torch.tensor([1.5, 1.5078125], dtype=torch.bfloat16)
    assert int((result == above).sum()) == lower
    assert int((result == below).sum()) == 65536 - lower


def test_dithering_keeps_inf_and_nan() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0]).repeat(4096)[:16384]
    x[2::5] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a payload in the lower half
    _, result = rounded(x, torch.full((16384,), 0xFFFF, dtype=torch.int32))
    assert torch.equal(result.isnan(), x.isnan())
    assert torch.equal(result.float().nan_to_num(7.0, 8.0, 9.0), x.nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power(dtype: torch.dtype) -> None:
    bases = [0.9, 0.999, 2.0, 1e-3, 1.0, 0.0, -2.0, -1.5]
    exponents = [1.0, 2.0, 3.0, 0.0, 0.5, -1.0, 1000.0, 2.5]
    x = torch.tensor([b for b in bases for _ in exponents], dtype=dtype)
    y = torch.tensor(exponents * len(bases), dtype=dtype)
    finite = torch.pow(x, y).isfinite()  # 0 ** -1 and overflows are left out
    out = torch.zeros_like(x)
    _power_kernel[(1,)](torch.where(finite, x, 1.0), y, out, BLOCK=64)
    tolerance = 1e-12 if dtype == torch.float64 else 2.0**-23
    torch.testing.assert_close(out[finite], torch.pow(x, y)[finite], rtol=tolerance, atol=0.0)
    _power_kernel[(1,)](
        torch.full((64,), -2.0, dtype=dtype), torch.full((64,), 0.5, dtype=dtype), out, BLOCK=64
    )
    assert out.isnan().all()


def bits(
    key: int = 1, start: int = 0, step: int = 1, tensor: int = 0, role: int = 0, block: int = 4096
) -> Tensor:
    out = torch.zeros(block, dtype=torch.int32)
    numbers = [torch.tensor([v], dtype=torch.int64) for v in (key, start, step, tensor)]
    _bits_kernel[(1,)](out, *numbers, ROLE=role, BLOCK=block)
    return out


def test_random_bits_are_uniform_and_independent() -> None:
    base = bits()
    assert int(base.min()) >= 0
    assert int(base.max()) < 65536
    sigma = 65536 / 12**0.5
    assert abs(base.double().mean() - 32767.5) < 4 * sigma / 4096**0.5
    ones = torch.stack([(base >> i & 1).double().mean() for i in range(16)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / 4096**0.5
    others = [bits(key=2), bits(step=2), bits(tensor=1), bits(role=1), bits(start=4096), bits(start=1 << 35)]
    for other in [*others, bits(key=1 + (1 << 32)), base.roll(1)]:
        correlation = torch.corrcoef(torch.stack([base, other]).double())[0, 1]
        assert abs(correlation) < 4 / 4096**0.5


def test_random_bits_depend_on_the_element_only() -> None:
    whole = bits(start=1 << 33)
    parts = [bits(start=(1 << 33) + at, block=1024) for at in range(0, 4096, 1024)]
    assert torch.equal(whole, torch.cat(parts))


def test_chunks_are_folded_where_there_are_more_than_lanes() -> None:
    """Each tensor's sums over its own chunks: none, one, and some hundreds."""
    ends = [0, 0, 1, 301, 1000]
    partials = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = torch.full((4, 2), 7.0, dtype=torch.float64)
    lib.fold_chunks[(4,)](partials, torch.tensor(ends), sums, WIDTH=2, LANES=FOLD_LANES)
    wanted = [partials[low:high].sum(0) for low, high in itertools.pairwise(ends)]
    torch.testing.assert_close(sums, torch.stack(wanted), rtol=0, atol=1e-12)


# ---- rules ------------------------------------------------------------------------------------------


@rule(writes="w")
def everything(w: Any, g: Any, tenth: Any) -> Any:
    """Every function and operator, with literals in every place where a dtype could be lost."""
    a = where(g > 0.1, 0.1, g)
    b = maximum(a, -RATE) + minimum(0.3, w) - sign(w - 0.1)
    c = exp(-abs(w)) * log(1.0 + abs(g)) + sqrt(abs(w) + HALF)
    d = w**2 + abs(w) ** 1.5 - (w * 0.5) ** 3 + fast_power(abs(w) + HALF, -0.7)
    return w + tenth * (b * c + d) / (2.0 - -1.0)


@rule(writes=("tenth", "kept"))
def make_tenth(numel: Any) -> Any:
    """0.1 in double precision on two ways; 0.1 in float32 is off by 1.5e-9."""
    return where(numel > 0.0, 0.1, numel), 2.0**-1.0 * 0.2


class Everything(Transform):
    name = "everything"
    rules: ClassVar = {"scalars": make_tenth, "after": everything}


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_rules_mean_what_they_mean_on_tensors(dtype: torch.dtype, tolerance: float) -> None:
    bucket = Bucket(
        Setup(sgd, [999], [Everything()], w=dtype), lambda p, la, n, i: TritonStep(p, la, n, i, "cpu")
    )
    before, gradients = bucket.weights[0].clone(), bucket.gradients()
    bucket.step(gradients)
    expected = everything(before, gradients[0].to(dtype), 0.1)
    torch.testing.assert_close(bucket.weights[0], expected, rtol=tolerance, atol=tolerance)
    cols, table = bucket.runner._arguments["cols"][0], bucket.runner.columns.cols
    assert cols[table.index("everything.tenth")].item() == 0.1
    assert cols[table.index("everything.kept")].item() == pytest.approx(0.1, abs=1e-16)
