"""Golomb codes of ternary masks: the specification's table, identity for all masks, sizes by entropy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optx.delta import _golomb as golomb
from optx.kernels.ternary import cpu as ternary_cpu
from optx.kernels.ternary.cpu import DROPPED, FOURS, SPAN, THIRDS

TABLE = {
    0.05: (4, 0.339306, 0.336397),
    0.1: (3, 0.575583, 0.568996),
    0.2: (2, 0.938753, 0.921928),
    0.3: (1, 1.188235, 1.181291),
    0.5: (0, 1.5, 1.5),
}


def masks_of(t: Tensor) -> Tensor:
    """The masks of a ternary vector, bit by bit: slow, and by other means than the kernels."""
    bits = np.zeros((2, -(-len(t) // 64) * 64), dtype=bool)
    bits[0, : len(t)], bits[1, : len(t)] = (t > 0).numpy(), (t < 0).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int64).copy())


def random_signs(n: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, generator=generator) < density
    return torch.where(kept, torch.randint(0, 2, (n,), generator=generator) * 2 - 1, 0)


FOUR_BITS = {  # Huffman's code, written out: first position last
    "0000": "000", "0001": "001", "0010": "010",
    "0011": "0110", "0100": "0111", "0101": "1000", "0110": "1001",
    "1000": "1010", "1001": "1011", "1010": "1100", "1100": "1101",
    "0111": "11100", "1011": "11101", "1101": "11110", "1110": "111110", "1111": "111111",
}  # fmt: skip


def slow_bits(t: Tensor, code: int) -> str:
    """The bits of one block with a code, as the format's description says, one by one."""
    m = (3 if code & THIRDS else 1) << (code & 31)
    signs = "".join("1" if x < 0 else "0" for x in t.tolist() if x)
    coded = (t == 0) if code & DROPPED else (t != 0)
    if code & FOURS:
        bits = "".join(str(int(x)) for x in coded) + "0" * (-len(t) % 4)
        return signs + "".join(FOUR_BITS[bits[i : i + 4][::-1]] for i in range(0, len(bits), 4))
    places = [-1, *coded.nonzero().flatten().tolist()]
    text = ""
    for before, at in itertools.pairwise(places):
        quotient, rest = divmod(at - before - 1, m)
        text += "1" * quotient + "0"
        if code & THIRDS:
            text += ("0", "10", "11")[rest >> (code & 31)]
        text += "".join(str(rest >> bit & 1) for bit in range(code & 31))
    return signs + text


def as_stream(text: str) -> list[int]:
    padded = text + "0" * (-len(text) % 32)
    return [int(padded[i : i + 32][::-1], 2) for i in range(0, len(padded), 32)]


@pytest.mark.parametrize("density", TABLE)
def test_table_of_the_specification(density: float) -> None:
    b, rice, entropy = TABLE[density]
    assert golomb.rice_parameter(density) == b
    assert golomb.rice_bits(density) == pytest.approx(rice, abs=1e-6)
    assert golomb.entropy(density) == pytest.approx(entropy, abs=1e-6)
    ratios = {0.05: 47.6, 0.1: 28.1, 0.2: 17.4, 0.3: 13.5, 0.5: 10.7}
    assert 16 / golomb.entropy(density) == pytest.approx(ratios[density], abs=0.05)


def test_entropy_at_the_ends() -> None:
    assert golomb.entropy(0.0) == 0.0
    assert golomb.entropy(1.0) == 1.0
    assert golomb.rice_parameter(1.0) == 0


@pytest.mark.parametrize(("code", "bits"), [(1, 8), (2, 9)])
def test_gaps_of_the_specification(code: int, bits: int) -> None:
    t = torch.zeros(10, dtype=torch.int64)
    t[[3, 7, 8]] = torch.tensor([-1, 1, -1])
    assert len(slow_bits(t, code)) == 3 + bits
    for used in (code, 0, 5, 1 | THIRDS):
        stream = coded(t, used)
        assert [x % 2**32 for x in stream.tolist()] == as_stream(slow_bits(t, used))


def coded(t: Tensor, code: int) -> Tensor:
    """The stream of one block with a given code, by the kernel."""
    bits = len(slow_bits(t, code))
    kept = int((t != 0).sum())
    starts = torch.tensor([0, -(-bits // 32)])
    return ternary_cpu.encode(masks_of(t), len(t), torch.tensor([[kept, code, bits - kept]]), starts)


@settings(max_examples=120)
@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from([*range(7), *(i | THIRDS for i in range(5)), FOURS]),
    st.booleans(),
    st.integers(0, 999),
)
def test_kernels_follow_the_format(n: int, density: float, low: int, dropped: bool, seed: int) -> None:
    t, code = random_signs(n, density, seed), low | (DROPPED if dropped else 0)
    text = slow_bits(t, code)
    stream = coded(t, code)
    assert [x % 2**32 for x in stream.tolist()] == as_stream(text)
    table = torch.tensor([[int((t != 0).sum()), code, 0]])
    back = ternary_cpu.decode(n, table, torch.tensor([0, len(stream)]), stream)
    assert back is not None
    assert torch.equal(back, masks_of(t))


@settings(max_examples=60)
@given(st.integers(1, 700), st.floats(0, 1), st.integers(0, 999))
def test_the_code_is_the_shortest(n: int, density: float, seed: int) -> None:
    """Of every code there is; within a bit per kept number where the mask is far from random."""
    t = random_signs(n, density, seed)
    [[kept, code, bits]] = ternary_cpu.measure(masks_of(t), n).tolist()
    assert kept == int((t != 0).sum())
    assert len(slow_bits(t, code)) == kept + bits
    dropped = code & DROPPED
    codes = [c | d for c in range(10) for d in (0, THIRDS)]
    if n >> 2 <= min(kept, n - kept) < n >> 1:  # elsewhere it isn't tried
        codes.append(FOURS)
    lengths = [len(slow_bits(t, c | dropped)) for c in codes]
    assert kept + bits <= min(lengths)


SIZES = [1, 2, 63, 64, 65, 1000, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 77]


@pytest.mark.parametrize("n", SIZES)
def test_round_trip(n: int) -> None:
    ends = torch.zeros(n, dtype=torch.int64)
    ends[0], ends[-1] = 1, -1
    first, last = (torch.zeros(n, dtype=torch.int64) for _ in range(2))
    first[0], last[-1] = -1, 1
    full = random_signs(n, 2.0)
    holes = full.clone()
    holes[n // 2] = 0
    cases = [torch.zeros(n, dtype=torch.int64), full, holes, ends, first, last]
    cases += [random_signs(n, p) for p in (0.0001, 0.003, 0.05, 0.2, 0.38, 0.5, 0.51, 0.9, 0.999)]
    for t in cases:
        masks = masks_of(t)
        payload = golomb.encode(masks, n)
        assert len(payload) == golomb.layout(masks, n)[1]
        assert torch.equal(golomb.decode(payload, n), masks)


@settings(max_examples=80)
@example(0, [])
@given(st.integers(0, 3000), st.lists(st.tuples(st.integers(0, 2999), st.integers(1, 400)), max_size=6))
def test_round_trip_of_clustered_masks(n: int, runs: list[tuple[int, int]]) -> None:
    t = torch.zeros(n, dtype=torch.int64)
    for start, length in runs:
        t[start : start + length] = random_signs(length, 0.8, start)[: max(0, n - start)]
    payload = golomb.encode(masks_of(t), n)
    assert torch.equal(golomb.decode(payload, n), masks_of(t))


def test_threads_do_not_show() -> None:
    masks, n = masks_of(random_signs(5 * SPAN + 9, 0.2)), 5 * SPAN + 9
    payloads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        payloads.append(golomb.encode(masks, n))
        assert torch.equal(golomb.decode(payloads[-1], n), masks)
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize("density", [*TABLE, 0.01, 0.34, 0.36, 0.38, 0.42, 0.6, 0.66, 0.8, 1.0])
def test_a_million_entries(density: float) -> None:
    """Within 1.5 % of the entropy of the mask that was drawn, and not below it; never above Rice's code."""
    n = 1_000_000
    t = random_signs(n, density, seed=7)
    bits = 8 * len(golomb.encode(masks_of(t), n)) / n
    drawn = float((t != 0).double().mean())
    actual = golomb.entropy(drawn)
    assert actual * 0.9999 <= bits <= actual * (1.01 if density in TABLE else 1.015)
    assert bits <= golomb.rice_bits(drawn) * 1.01


def test_local_density_is_used() -> None:
    """Rows that fine-tuning never touched (of an embedding) cost next to nothing."""
    t = torch.cat([random_signs(2 * SPAN, 0.4), torch.zeros(8 * SPAN, dtype=torch.int64)])
    whole = golomb.entropy(float((t != 0).double().mean())) * len(t) / 8
    assert len(golomb.encode(masks_of(t), len(t))) < 0.8 * whole


@settings(max_examples=150)
@given(st.integers(1, 400), st.binary(max_size=120), st.integers(0, 255))
def test_nonsense_is_refused_or_read_in_bounds(n: int, noise: bytes, code: int) -> None:
    """Bytes that a checksum would have let through: a mask of n numbers, or ValueError; never memory."""
    head = (code << 24 | min(n, len(noise))).to_bytes(4, "little")
    words = noise[: len(noise) // 4 * 4]
    try:
        masks = golomb.decode(head + (len(words) // 4).to_bytes(2, "little") + words, n)
    except ValueError:
        return
    assert masks.shape == (2, -(-n // 64))
    beyond = masks.numpy().view(np.uint8).reshape(2, -1)
    assert not np.unpackbits(beyond, axis=1, bitorder="little")[:, n:].any()
    assert not (masks[0] & masks[1]).any()


def test_a_table_that_makes_no_sense() -> None:
    payload = golomb.encode(masks_of(random_signs(1000, 0.2)), 1000)
    for bad in (payload[:3], payload + b"1234", payload[:-4], b"\xff" * len(payload)):
        with pytest.raises(ValueError, match=r"too short|no sense"):
            golomb.decode(bad, 1000)
