"""Numbers in 8 bits and in two parts: `optx.step.formats`, on tensors and in the CPU's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.kernels.step.cpu import CpuStep
from optx.kernels.step.layout import GROUP, Layout
from optx.step.formats import decode, encode, joined, joined_rest, reciprocal, split

EIGHT = ("signed8", "nonnegative8")


def numbers(seed: int, count: int, moment: str, size: float = 1.0) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    return x if moment == "signed" else x.square()


def step_of(x: Tensor, moment: str) -> Tensor:
    """What one code is worth at each number, at most."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.numel() % GROUP)).view(-1, GROUP)
    largest = padded.amax(1, keepdim=True) * (1 + 2.0**-7)  # scales are rounded up
    if moment == "nonnegative":
        root, unit = padded.sqrt(), largest.sqrt() / 255
        return ((root + unit).square() - (root - unit).clamp_min(0).square()).view(-1)[: x.numel()]
    y = padded / largest.clamp_min(1e-30)
    return (largest / 127 * (1 + y).square()).view(-1)[: x.numel()]  # 2 / phi'


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 9), st.sampled_from(("signed", "nonnegative")), st.floats(-12, 12))
def test_a_number_comes_back_to_within_a_code(count: int, seed: int, moment: str, power: float) -> None:
    x = numbers(seed, count, moment, 10.0**power)
    codes, scale = encode(x, moment)
    assert codes.shape == x.shape
    assert scale.shape == (-(-count // GROUP),)
    back = decode(codes, scale)
    assert ((back - x).abs() <= step_of(x, moment) * 1.001 + 1e-37).all()
    assert ((x != 0) == (back != 0)).all() if moment == "nonnegative" else True


@pytest.mark.parametrize("moment", ["signed", "nonnegative"])
def test_codes_rise_with_their_numbers(moment: str) -> None:
    low = -1.0 if moment == "signed" else 0.0
    x, _ = torch.cat([torch.linspace(low, 1.0, GROUP - 1), torch.tensor([1.0])]).sort()
    for offset in range(50):
        group = x * (1 + offset / 100)
        codes, scale = encode(group, moment)
        assert (codes[1:].int() >= codes[:-1].int()).all()
        assert (decode(codes, scale).diff() >= 0).all()


def test_all_codes_have_numbers_of_their_own() -> None:
    for dtype, low, high in ((torch.int8, -127, 127), (torch.uint8, 0, 255)):
        codes = torch.arange(low, high + 1).to(dtype)
        scale = torch.ones(-(-codes.numel() // GROUP), dtype=torch.bfloat16)
        values = decode(codes, scale)
        assert (values.diff() > 0).all()
        assert values[-1] == pytest.approx(1.0, abs=4e-6)
        q = codes.double()
        exact = (q / 127) / (2 - q.abs() / 127) if dtype == torch.int8 else (q / 255).square()
        assert torch.allclose(values.double(), exact, rtol=4e-6, atol=0)


def test_the_reciprocal_is_good_to_22_bits_less_4() -> None:
    u = torch.linspace(1, 2, 100_001)
    assert (reciprocal(u).double() * u.double() - 1).abs().max() < 3.2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bad: float) -> None:
    x = torch.ones(3 * GROUP)
    x[GROUP + 5] = bad
    back = decode(*encode(x, "signed"))
    assert back[GROUP : 2 * GROUP].isnan().all()
    others = torch.cat([back[:GROUP], back[2 * GROUP :]])
    assert torch.allclose(others, torch.ones(2 * GROUP), rtol=4e-6, atol=0)


@pytest.mark.parametrize("moment", ["signed", "nonnegative"])
def test_groups_of_nothing(moment: str) -> None:
    zeros = torch.zeros(40)
    assert torch.equal(decode(*encode(zeros, moment)), zeros)
    assert decode(*encode(torch.zeros(0, 7), moment)).shape == (0, 7)
    one = torch.tensor(0.25)
    assert decode(*encode(one, moment)) == pytest.approx(0.25, rel=4e-6)
    assert torch.equal(
        decode(*encode(torch.full((4,), 1e-39), "signed")), torch.zeros(4)
    )  # below the smallest


def every_half() -> Tensor:
    """Floats around all bfloat16 numbers."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64)
    low = torch.tensor([0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF])
    return ((halves[:, None] << 16) + low).to(torch.int32).view(-1).view(torch.float32)


def test_sixteen_bits_beside_a_bfloat16_lose_nothing() -> None:
    x = every_half()
    half, rest = split(x, 16)
    back = joined(half, rest)
    same = back.view(torch.int32) == x.view(torch.int32)
    assert (same | (x.isnan() & back.isnan())).all()


def test_eight_bits_beside_a_bfloat16_keep_fifteen_after_the_point() -> None:
    x = every_half()
    x = x[x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 1e38)]
    half, rest = split(x, 8)
    back = joined(half, rest)
    assert ((back.double() - x.double()).abs() <= x.double().abs() * 2.0**-16).all()
    assert (
        (half.double() - x.double()).abs() <= x.double().abs() * (2.0**-8 + 2.0**-16)
    ).all()  # the nearest
    again, rest_again = split(back, 8)
    assert torch.equal(again, half)
    assert torch.equal(rest_again, rest)


def test_a_weight_that_was_set_to_zero_stays_near_it() -> None:
    rest = torch.arange(-128, 128).to(torch.int8)
    for zero in (0.0, -0.0):
        back = joined(torch.full((256,), zero, dtype=torch.bfloat16), rest)
        assert back.abs().max() < 1e-38


def test_rests_change_their_width() -> None:
    rest = torch.arange(-128, 128).to(torch.int8)
    wide = joined_rest(rest, torch.int16)
    assert torch.equal(joined_rest(wide, torch.int8), rest)
    assert joined_rest(torch.tensor([32767], dtype=torch.int16), torch.int8) == 127


# ---- kernels ----------------------------------------------------------------------------------------------

ADAMW = optx.wrap(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.0)).program(0)
NUMBERS = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def run(layout: Layout, roles: dict[str, Tensor], steps: int = 1) -> None:
    """AdamW's kernel over one tensor."""
    step = CpuStep(ADAMW, layout, [roles["w"].numel()], [0])
    step.tensors[0, :-1] = [roles[r].data_ptr() for r in (*step.columns.roles, *step.columns.cells)]
    step.hypers[:] = [NUMBERS[name] for name in step.columns.hypers]
    for number in range(steps):
        step.set_key(number)
        step.step()


def coded(m: Tensor, v: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    roles: dict[str, Tensor] = {"w": w, "g": g, "step": torch.zeros(())}
    roles["exp_avg"], roles["exp_avg.scale"] = encode(m, "signed")
    roles["exp_avg_sq"], roles["exp_avg_sq.scale"] = encode(v, "nonnegative")
    return roles


@pytest.fixture(scope="module")
def eight() -> Layout:
    return Layout(("float32", "float32", *EIGHT), "nearest", True)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 127, 128, 129, 1000, 65536 + 40])
def test_a_kernel_reads_what_encode_writes_and_writes_what_decode_reads(eight: Layout, count: int) -> None:
    m, v = numbers(0, count, "signed"), numbers(1, count, "nonnegative")
    g = numbers(2, count, "signed")
    spare = [torch.full((count + 64,), 77, dtype=d) for d in (torch.int8, torch.uint8)]
    roles = coded(m, v, torch.zeros(count), g)
    for name, room in zip(("exp_avg", "exp_avg_sq"), spare, strict=True):
        roles[name] = room[:count].copy_(roles[name])
    m, v = (decode(roles[n], roles[f"{n}.scale"]) for n in ("exp_avg", "exp_avg_sq"))
    run(eight, roles)
    wanted = m + np.float32(0.1) * (g - m), v * np.float32(0.999) + np.float32(1 - 0.999) * g * g
    for name, exact, moment in zip(("exp_avg", "exp_avg_sq"), wanted, ("signed", "nonnegative"), strict=True):
        found = decode(roles[name], roles[f"{name}.scale"])
        assert ((found - exact).abs() <= 2 * step_of(exact, moment) * 1.001).all()
        assert torch.equal(roles[f"{name}.scale"], encode(exact, moment)[1])
    assert all((room[count:] == 77).all() for room in spare)  # a tail writes no further


def test_codes_are_rounded_as_often_up_as_their_number_is_near(eight: Layout) -> None:
    """With nearest codes a second moment would stay where it is: in a step it falls by 0.1 %."""
    m, v = numbers(3, 4096, "signed"), numbers(4, 4096, "nonnegative")
    g = torch.zeros(4096)
    roles = coded(m, v, torch.zeros(4096), g)
    before = decode(roles["exp_avg_sq"], roles["exp_avg_sq.scale"]).double()
    run(eight, roles, steps=300)
    after = decode(roles["exp_avg_sq"], roles["exp_avg_sq.scale"]).double()
    large = before > 0.05
    assert (after[large] / before[large]).mean() == pytest.approx(0.999**300, rel=0.01)
    signs = torch.sign(decode(*encode(m, "signed")))
    assert (torch.sign(decode(roles["exp_avg"], roles["exp_avg.scale"])) * signs >= 0).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_kernel_splits_weights_as_split_does(bits: int, eight: Layout) -> None:
    count = 777
    layout = Layout(("bfloat16", "float32", "float32", "float32"), f"split{bits}", True)
    w = numbers(5, count, "signed")
    half, rest = split(w, bits)
    w = joined(half, rest)
    rests: dict[str, Any] = {"w": half, "rest": rest, "g": numbers(6, count, "signed")}
    moments = {"exp_avg": torch.zeros(count), "exp_avg_sq": torch.zeros(count), "step": torch.zeros(())}
    run(layout, {**rests, **moments})
    assert torch.equal(joined(half, rest).view(torch.int32), w.view(torch.int32))  # lr is 0: joined and split
