"""RF8's numbers and bytes, against a copy of the authors' rounding in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rf8 as by_hand
from torch import Tensor, nn

import optx
from optx import OptxError, rf8
from optx._rf8 import exponent_of, largest
from optx.kernels.rf8.layout import GROWTH

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
EVERY = {"bfloat16": by_hand.every_bfloat16, "float16": by_hand.every_float16}
LARGEST = {torch.float32: 1.875 * 2.0**127, torch.bfloat16: 1.875 * 2.0**127, torch.float16: 61440.0}


def test_the_papers_numbers() -> None:
    w = torch.tensor([1.05, 1.1, 1.3, 1.4, 1.8, 1.96, 0.3, 0.7, -3.3, 0.011, 0.0])
    wanted = [1.0625, 1.125, 1.25, 1.5, 1.75, 2.0, 0.3125, 0.75, -3.5, 0.01171875, 0.0]
    assert rf8.quantise(w).tolist() == wanted
    assert rf8.pack(w).unpack().tolist() == wanted


@pytest.mark.parametrize("kind", EVERY)
def test_every_number_of_16_bits(kind: str) -> None:
    w = EVERY[kind]()
    made, wanted = rf8.quantise(w), by_hand.quantise(w)
    within = wanted.abs() <= LARGEST[w.dtype]
    assert torch.equal(made.double()[within], wanted[within])
    assert set(made[~within].abs().tolist()) == {LARGEST[w.dtype]}
    assert torch.equal(rf8.quantise(made), made)
    assert torch.equal(rf8.quantise(-w), -made)
    order = w.double().argsort(stable=True)
    assert bool((made.double()[order].diff() >= 0).all())
    for e_max in (-60, -3, 0, 9):
        some = w[w.double().abs() <= 2.0**e_max]
        got = rf8.pack(torch.cat([some, torch.tensor([2.0**e_max], dtype=w.dtype)]))
        assert got.e_max == e_max or kind == "float16"  # it has no 2**-60
        assert torch.equal(got.unpack(torch.float32)[:-1].double(), by_hand.packed(some, got.e_max))


def test_float32_about_each_breakpoint() -> None:
    at = torch.tensor([[place - 1, place] for place, _ in GROWTH], dtype=torch.int32).flatten()
    for exponent in (1, 100, 127, 200, 254):
        w = (at + (exponent << 23)).view(torch.float32)
        wanted = by_hand.quantise(w).clamp(max=LARGEST[torch.float32])
        assert torch.equal(rf8.quantise(w).double(), wanted)
        assert (wanted[0::2] < wanted[1::2]).all() or exponent == 254


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=12), st.integers(-12, 12))
def test_any_float32(numbers: list[float], k: int) -> None:
    w = torch.tensor(numbers)
    made, wanted = rf8.quantise(w), by_hand.quantise(w)
    assert torch.equal(made.double(), wanted.clamp(-LARGEST[w.dtype], LARGEST[w.dtype]))
    moved = w * 2.0**k
    exact = moved.double() == w.double() * 2.0**k
    if bool((exact & (moved.abs() < 2.0**126) & (w.abs() < 2.0**126)).all()):
        assert torch.equal(rf8.quantise(moved), made * 2.0**k)
    small = rf8.pack(w)
    if w.abs().max() < 1.5 * 2.0**127:
        assert torch.equal(small.unpack().double(), by_hand.packed(w, small.e_max))
    again = rf8.pack(small.unpack())
    assert torch.equal(again.unpack(), small.unpack())
    if small.codes.any() and again.e_max > -128:
        assert (again.e_max, again.codes.tolist()) == (small.e_max, small.codes.tolist())


def test_every_byte() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for e_max in (-128, -110, -109, -3, 0, 90, 127):
        values = [by_hand.value(code, e_max) for code in range(256)]
        made = rf8.Packed(codes, e_max).unpack()
        assert made.tolist() == values
        assert all(math.copysign(1, x) == 1 for x in made.tolist() if x == 0)
        if e_max > -128:  # some are below its smallest
            assert rf8.Packed(codes, e_max, torch.bfloat16).unpack().double().tolist() == values
        packed = rf8.pack(made)
        assert torch.equal(packed.unpack(), made)
        assert torch.equal(rf8.pack(packed.unpack()).codes, packed.codes)
        if e_max < 127:
            # One code a number: 3/2 is never 3/4 of the next power of two, but for the smallest.
            canonical = {c for c in range(256) if c == 0 or c & 127 == 8 or (c & 7 and c & 120)}
            assert set(packed.codes.tolist()) == canonical, e_max


def test_the_smallest_and_the_largest() -> None:
    least = 0.75 * 2.0**-14
    w = torch.tensor([1.0, least, least / 2, least / 2 * (1 - 2**-23), -least / 2, 1e-40])
    assert rf8.pack(w).unpack().tolist() == [1.0, least, least, 0.0, -least, 0.0]
    assert rf8.pack(torch.tensor([3.3e38, -1.0])).unpack().tolist() == [1.5 * 2.0**127, 0.0]
    tiny = torch.tensor([1, 2, 3, 5, 11], dtype=torch.int32).view(torch.float32)
    assert torch.equal(rf8.quantise(tiny).double(), by_hand.quantise(tiny))
    assert rf8.pack(tiny).e_max == -128
    assert rf8.pack(torch.tensor([60000.0])).unpack(torch.float16).tolist() == [61440.0]
    assert rf8.pack(torch.tensor([65504.0], dtype=torch.float16)).unpack().tolist() == [65504.0]
    for one in (torch.zeros(3), torch.empty(0, 4)):
        assert torch.equal(rf8.pack(one).unpack(), one)
        assert torch.equal(rf8.quantise(one), one)


def test_errors_of_rounding() -> None:
    w = 1 + torch.arange(1 << 20) / (1 << 20)
    off = (rf8.quantise(w) / w - 1).abs()
    assert round(float(off.max()), 4) == 0.1082
    assert round(float(off.square().mean().sqrt()), 4) == 0.0398


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_strides(dtype: torch.dtype) -> None:
    for n in (0, 1, 15, 33, 70_001):
        w = torch.randn(n + 3, 2, generator=torch.Generator().manual_seed(n)).to(dtype)
        for view in (w[3:], w[3:].t(), w[3:, 1], w[::2]):
            small = rf8.pack(view)
            assert (small.shape, small.dtype, small.nbytes) == (view.shape, dtype, view.numel() + 1)
            assert torch.equal(small.unpack().double(), by_hand.packed(view, small.e_max))
    assert rf8.pack(torch.tensor(1.3, dtype=dtype)).unpack().item() == 1.25


def test_threads_do_not_show() -> None:
    w = torch.randn(400_001)
    one = rf8.pack(w)
    torch.set_num_threads(3)
    try:
        three, again = rf8.pack(w), one.unpack()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.codes, three.codes)
    assert torch.equal(one.unpack(), again)


def test_state_dicts() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = rf8.pack(model)
    assert {name for name, one in small.items() if isinstance(one, rf8.Packed)} == {"0.weight"}
    wide = rf8.unpack(small)
    assert list(wide) == list(before)
    assert torch.equal(wide["0.weight"], rf8.quantise(before["0.weight"]))
    assert torch.equal(wide["0.bias"], before["0.bias"])
    every = rf8.quantise(before, include=".*", exclude="1[.]running_.*")
    assert not torch.equal(every["0.bias"], before["0.bias"])
    assert every["1.running_mean"] is before["1.running_mean"]
    assert every["1.num_batches_tracked"] is before["1.num_batches_tracked"]
    assert rf8.unpack(small, torch.bfloat16)["0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rf8.pack({"a.w": torch.tensor([[1.0, math.nan]])}), "pack: 'a.w' has nan among its"),
        (lambda: rf8.quantise(torch.tensor([-math.inf])), "quantise: the tensor has inf among its"),
        (lambda: rf8.pack(torch.zeros(2, dtype=torch.float64)), "is torch.float64; RF8 packs float32"),
        (lambda: rf8.pack({"b": torch.zeros(2)}), "there are no weights .floating tensors of two"),
        (
            lambda: rf8.pack({"b": torch.zeros(2)}, include="c"),
            "there are no weights with include='c'.*Near: 'b'",
        ),
        (lambda: rf8.pack({"b": torch.zeros(2)}, include="("), r"pack: include='\(' is not a regular"),
        (lambda: rf8.pack(torch.zeros(2), exclude="c"), "choose by name, and this is one tensor"),
        (lambda: rf8.pack({"b": 2}), "'b' is a int; it must be a tensor"),  # type: ignore[call-overload]
        (lambda: rf8.pack([1.0]), "this is a list; it must be a tensor"),  # type: ignore[call-overload]
        (lambda: rf8.pack(torch.zeros(2, device="meta")), "on the meta device, without numbers"),
        (lambda: rf8.pack(torch.eye(2).to_sparse()), "another layout; give a plain tensor"),
        (lambda: rf8.Packed(torch.zeros(2), 0), "codes is torch.float32; it must be a tensor of uint8"),
        (lambda: rf8.Packed(torch.zeros(2, dtype=torch.uint8), 128), "e_max is 128; it must be a whole"),
        (lambda: rf8.pack(torch.zeros(2)).unpack(torch.int8), "dtype is torch.int8; it must be"),
        (lambda: rf8.unpack(torch.zeros(2)), "this is a Tensor; it must be what"),  # type: ignore[call-overload]
    ],
)
def test_mistakes(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptxError, match=said):
        call()


def test_e_max_is_the_largest_codes() -> None:
    """3/2 of a power of two is a multiple of this one: what is unpacked has the same exponent."""
    for largest_one, e_max in ((1.3, 0), (1.4, 0), (1.5, 0), (1.64, 0), (1.65, 1), (1.99, 1), (2.0, 1)):
        small = rf8.pack(torch.tensor([largest_one, 1e-9]))
        assert small.e_max == e_max
        assert rf8.pack(small.unpack()).e_max == e_max
    assert exponent_of(largest(torch.zeros(1)), "", "") == 0


def test_a_model_in_bytes_computes_nearly_the_same(digits_mlp: tuple[nn.Module, Tensor]) -> None:
    model, x = digits_mlp
    wanted = model(x)
    model.load_state_dict(rf8.quantise(model, include=".*"))
    assert float((model(x) - wanted).detach().norm() / wanted.detach().norm()) < 0.1


@pytest.fixture
def digits_mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), torch.rand(64, 64)


def test_public() -> None:
    assert optx.rf8.__all__ == ["Packed", "load", "load_into", "pack", "quantise", "save", "unpack"]
