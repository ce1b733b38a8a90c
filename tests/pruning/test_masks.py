"""Masks by themselves: bits, files, what they say, and how two meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optx._mask_bits import layout, ones, pack, packed_shape, unpack

SHAPES = st.lists(st.integers(0, 19), min_size=0, max_size=4).map(tuple)


def drawn(shape: tuple[int, ...], seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


# ---- bits -------------------------------------------------------------------------------------------------


@given(SHAPES, st.integers(0, 1000))
def test_bits_are_numpys(shape: tuple[int, ...], seed: int) -> None:
    mask = drawn(shape, seed)
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert tuple(bits.shape) == packed_shape(shape)
    rows = mask.reshape(layout(shape))
    assert np.array_equal(bits.numpy(), np.packbits(rows.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack(bits, shape), mask)
    assert ones(bits) == int(mask.sum())


@pytest.mark.parametrize("offset", range(9))
def test_views_and_transposes_are_packed_as_what_they_show(offset: int) -> None:
    mask = drawn((9, 40))[:, offset : offset + 24]
    assert torch.equal(unpack(pack(mask), (9, 24)), mask)
    flat = drawn((9 * 24 + 8,))[offset : offset + 9 * 24].view(9, 24)
    assert torch.equal(unpack(pack(flat), (9, 24)), flat)
    assert torch.equal(unpack(pack(flat.t()), (24, 9)), flat.t())
