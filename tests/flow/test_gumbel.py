"""Gumbel draws: their law, their tails, their seeds."""

from __future__ import annotations

import pytest
import torch

from optx._gumbel import gumbel

EULER = 0.5772156649


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_an_argmax_that_draws_the_category(dtype: torch.dtype) -> None:
    draws = gumbel((200_000, 3), generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert draws.isfinite().all()
    assert draws.mean().item() == pytest.approx(EULER, abs=0.01)
    assert draws.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.02)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=dtype)
    chosen = (weights.log() + draws).argmax(-1)
    assert torch.bincount(chosen, minlength=3) / len(chosen) == pytest.approx(weights.tolist(), abs=0.005)


def test_a_seed_gives_the_same_draws() -> None:
    one, two = (gumbel((4, 5), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_each_row_has_its_own_generator() -> None:
    rows = gumbel((3, 5), generator=[torch.Generator().manual_seed(i) for i in (3, 4, 3)])
    assert torch.equal(rows[0], gumbel((5,), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bfloat16; it must be torch\.float32"):
        gumbel((2,), dtype=torch.bfloat16)
