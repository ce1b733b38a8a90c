"""Random bits of the CPU's kernels: what is rounded by them is rounded evenly, and no two by the same.

The numbers are those of generated code: its key of a role, its element numbers. All bounds are five to six
standard deviations, over a few thousand statistics; seeds are fixed.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from optx.kernels.cpu import mix, random_bits, store, upper_half
from optx.kernels.step.cpu_lines import key_of
from optx.step.rounding import step_key

N = 1 << 17
BITS = np.arange(32, dtype=np.uint32)
_TEXT = f"""
def draw(key, tensor, start, role, out, values, rounded):
    key = mix(key, tensor)
    key = {key_of(0)} if role == 0 else {key_of(1)} if role == 1 else {key_of(2)}
    for i in range(len(out)):
        bits = random_bits(i, start, key)
        out[i] = bits
        put(rounded, i, values[i], upper_half(bits) if role == 1 else bits)
"""


@pytest.fixture(scope="module")
def drawn() -> Any:
    names: dict[str, Any] = {"mix": mix, "random_bits": random_bits, "upper_half": upper_half}
    exec(_TEXT, names := {**names, "put": store("bfloat16", 0, True)})
    kinds = (*(types.int64,) * 4, types.int32[::1], types.float32[::1], types.int64)
    compiled = numba.njit(kinds)(names["draw"])

    def draw(
        seed: int = 0, step: int = 0, tensor: int = 0, start: int = 0, role: int = 0, values: Any = None
    ) -> tuple[Any, Any]:
        values = np.zeros(N, np.float32) if values is None else values
        out, rounded = np.zeros(len(values), np.int32), np.zeros(len(values), np.uint16)
        compiled(step_key(seed, step), tensor, start, role, out, values, rounded.ctypes.data)
        return out.view(np.uint32), rounded

    return draw


def off(x: Any, bins: int) -> float:
    """How far a chi-square over so many bins is from what is expected, in standard deviations."""
    counts = np.bincount(x.astype(np.int64), minlength=bins)
    wanted = len(x) / bins
    return float((((counts - wanted) ** 2 / wanted).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5)


def related(a: Any, b: Any) -> float:
    """The most that a bit of one has to do with a bit of the other, in standard deviations."""
    first, second = ((((x[:, None] >> BITS) & 1) * 2.0 - 1.0).astype(np.float32) for x in (a, b))
    return float(np.abs(first.T @ second).max()) / len(a) ** 0.5


def other(drawn: Any) -> dict[str, Any]:
    """Draws whose key or number is near that of element 0 of tensor 0 in step 0 of seed 0."""
    return {
        "step": drawn(step=1)[0],
        "next step": drawn(step=2)[0],
        "tensor": drawn(tensor=1)[0],
        "next tensor": drawn(tensor=2)[0],
        "role": drawn(role=1)[0],
        "next role": drawn(role=2)[0],
        "seed": drawn(seed=1)[0],
        "chunk": drawn(start=65536 * 2)[0],
        "far chunk": drawn(start=1 << 32)[0],
    }


@pytest.mark.parametrize("given", [{}, {"step": 7}, {"tensor": 5}, {"start": (1 << 32) - 1000}, {"role": 2}])
def test_bits_bytes_and_halves_are_even(drawn: Any, given: dict[str, int]) -> None:
    x, _ = drawn(**given)
    ones = ((x[:, None] >> BITS) & 1).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / N**0.5
    for shift in range(0, 32, 8):
        assert abs(off((x >> np.uint32(shift)) & 0xFF, 256)) < 5
    for shift in (0, 16):
        assert abs(off(((x >> np.uint32(shift)) & 0xFFFF) >> np.uint32(4), 4096)) < 5
    assert related(x, x[::-1].copy()) < 6


def test_neighbours_are_unrelated(drawn: Any) -> None:
    x, _ = drawn()
    for lag in (1, 2, 3, 8, 16, 32, 128, 1000):
        assert related(x[:-lag], x[lag:]) < 6, lag
        for apart in (x[:-lag] ^ x[lag:], x[lag:] - x[:-lag]):
            for shift in (0, 8, 16, 24):
                assert abs(off(apart >> np.uint32(shift) & 0xFF, 256)) < 5, lag
    for shift in (0, 8, 16, 24):  # pairs of bytes, in the plane
        byte = (x >> np.uint32(shift)) & 0xFF
        assert abs(off(byte[:-1] >> 2 << 6 | byte[1:] >> 2, 4096)) < 5
    # The halves of one draw serve two tensors.
    low, high = x & 0xFFFF, x >> np.uint32(16)
    assert abs(off((low >> 10) << 6 | high >> 10, 4096)) < 5


def test_steps_tensors_roles_seeds_and_chunks_have_draws_of_their_own(drawn: Any) -> None:
    x = drawn()[0]
    for name, y in other(drawn).items():
        assert related(x, y) < 6, name
        assert abs(off((x ^ y) & 0xFF, 256)) < 5, name
        assert abs(off((x >> 10 & 63) << 6 | (y >> 10 & 63), 4096)) < 5, name
        assert (x == y).sum() < 5, name
    # Nor are another's numbers found a few elements on.
    for a, b in combinations([x[:4096], *(y[:4096] for y in other(drawn).values())], 2):
        assert len(np.intersect1d(a, b)) < 5


def test_an_element_has_its_draw_wherever_a_run_begins(drawn: Any) -> None:
    x, _ = drawn()
    for start in (128, 65536):
        assert np.array_equal(drawn(start=start)[0][:1000], x[start : start + 1000])


@pytest.mark.parametrize("role", [0, 1])
def test_what_is_rounded_has_the_number_as_its_mean(drawn: Any, role: int) -> None:
    """A moment of bfloat16 that falls by little in each step, as at beta2 = 0.999, falls on average."""
    for fraction in (1 / 512, 0.125, 0.5, 0.999):
        values = np.full(N, 1 + fraction / 128, np.float32)
        total = np.zeros(N)
        for step in range(4):
            rounded = (drawn(step=step, role=role, values=values)[1] - 0x3F80).astype(np.int64)
            assert set(rounded.tolist()) <= {0, 1}
            total += rounded
        sigma = (fraction * (1 - fraction) / 4 / N) ** 0.5
        assert abs(total.mean() / 4 - fraction) < 5 * sigma + 2.0**-17
        # Each element for itself, too: over steps as over elements.
        spread = total.var() / (4 * fraction * (1 - fraction))
        assert spread == pytest.approx(1.0, abs=5 * (3 / N / min(fraction, 1 - fraction)) ** 0.5)
