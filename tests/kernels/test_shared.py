"""Weights read from a short array: where each lies, against Python's integers; the CPU kernels."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import shared
from torch import Tensor

from optx.kernels.shared import cpu, mapping
from optx.kernels.shared.mapping import Place

MAPPINGS = ("fold", "hashed", "roast")
seeds = st.integers(-(2**63), 2**63 - 1)


@st.composite
def places(draw: st.DrawFn, kinds: tuple[str, ...] = MAPPINGS) -> Place:
    kind = draw(st.sampled_from(kinds))
    tall, wide = draw(st.sampled_from([(16, 16), (1, 8)])) if kind == "roast" else (1, 1)
    slots = draw(st.integers(tall * wide, 700))
    cols, rows = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    offset = draw(st.one_of(st.integers(0, 2000), st.integers(0, 2**40)))
    scale = draw(st.floats(0.0078125, 8.0, width=32))
    seed, order = draw(seeds), draw(st.integers(0, 9))
    return Place(kind, slots, offset, rows * cols, seed, scale, order, cols, tall, wide)


@settings(max_examples=40)
@given(places())
def test_slots_and_signs_are_those_of_the_definition(place: Place) -> None:
    assert mapping.slots(place).tolist() == [shared.slot(place, j) for j in range(place.numel)]
    assert mapping.signs(place).tolist() == [shared.sign(place, j) for j in range(place.numel)]


@settings(max_examples=60)
@given(places())
def test_the_kernels_gather_and_sum_what_torch_does(place: Place) -> None:
    dtype = torch.bfloat16 if place.mapping == "fold" and place.seed % 2 else torch.float32
    psi = torch.randn(place.slots)
    assert torch.equal(cpu.gather(psi, place, dtype), mapping.gather(psi, place, dtype))
    values = torch.randn(place.numel).to(dtype)
    for signed in (True, False):
        sums = cpu.scatter(values, place, torch.float32, signed)
        exact = mapping.scatter(values.double(), place, torch.float64, signed)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_neither_direction_knows_how_many_threads_there_are(kind: str) -> None:
    place = Place(kind, 9001, 77, 300 * 400, 5, 0.3, cols=400)
    psi, values = torch.randn(9001), torch.randn(place.numel)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weights, sums = cpu.gather(psi, place, torch.float32), cpu.scatter(values, place, torch.float32)
            found.append((weights, sums))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))


@pytest.mark.long
def test_float64_is_computed_in_float64() -> None:
    place = Place("fold", 37, 3, 200, 1, 0.7)
    psi, values = torch.randn(37, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    assert torch.equal(cpu.gather(psi, place, torch.float64), mapping.gather(psi, place, torch.float64))
    exact = mapping.scatter(values, place, torch.float64)
    torch.testing.assert_close(cpu.scatter(values, place, torch.float64), exact, rtol=1e-12, atol=1e-13)


@given(st.integers(1, 500), st.integers(0, 3000), seeds)
def test_a_fold_is_balanced_to_one(m: int, more: int, seed: int) -> None:
    """Property 1: of n weights every slot has floor(n / m) or ceil(n / m)."""
    n = m + more
    loads = Counter(mapping.slots(Place("fold", m, 0, n, seed, 1.0)).tolist())
    assert sum(loads.values()) == n
    assert set(loads.values()) <= {n // m, -(-n // m)}
    assert len(loads) == m


@given(st.integers(1, 500), seeds)
def test_a_fold_of_one_segment_is_a_rotation(m: int, seed: int) -> None:
    """Property 2: one-to-one."""
    slots = mapping.slots(Place("fold", m, 0, m, seed, 1.0))
    assert torch.equal(slots, (torch.arange(m) + slots[0]) % m)


def _digest(found: Tensor) -> str:
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()[:12]


def test_hashes_are_the_same_in_every_process_and_another_seed_has_others() -> None:
    """Property 6: numbers that were written down; nothing of the process goes into them."""
    kept = {}
    for kind in MAPPINGS:
        for seed in (0, 1):
            place = Place(kind, 1000, 64, 3000, seed, 1.0, 2, 60)
            kept[kind, seed] = _digest(mapping.slots(place)), _digest(mapping.signs(place))
    assert kept == WRITTEN
    assert len({slots for slots, _ in kept.values()}) == 6


def test_signs_are_even_and_independent_of_slots() -> None:
    place = Place("fold", 1000, 0, 200_000, 3, 1.0)
    signs = mapping.signs(place).double()
    assert abs(float(signs.mean())) < 0.01
    by_slot = torch.zeros(1000, dtype=torch.float64).index_add_(0, mapping.slots(place), signs)
    assert 0.9 < float(by_slot.var()) / 200 < 1.1  # 200 coins a slot


def test_neither_index_nor_signs_take_memory() -> None:
    place = Place("fold", 10_000, 0, 1_000_000, 3, 1.0)
    psi = torch.randn(10_000, requires_grad=False)
    cpu.gather(psi, place, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        cpu.gather(psi, place, torch.float32)
    taken = sum(e.cpu_memory_usage for e in profile.key_averages() if e.cpu_memory_usage > 0)  # type: ignore[attr-defined]
    assert taken == 4 * place.numel


WRITTEN = {
    ("fold", 0): ("8d55aa6c3354", "7ec2835cde71"),
    ("fold", 1): ("6c23cd4b3549", "732dc5199d08"),
    ("hashed", 0): ("48d9189d812f", "7ec2835cde71"),
    ("hashed", 1): ("53f7a382fc46", "732dc5199d08"),
    ("roast", 0): ("75165f6ff85c", "7ec2835cde71"),
    ("roast", 1): ("1faf05ce63f8", "732dc5199d08"),
}
