"""The generalised Gaussian's moments, density and fit, against closed forms and integrals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optx import OptxError
from optx._generalised_gaussian import (
    RATIOS,
    SHAPES,
    density,
    fit_scale,
    fit_shape,
    moment_ratio,
    pooled_sums,
    unit_scale,
)

EIGHT = [1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0.1, -0.1]


def test_the_grid() -> None:
    assert len(SHAPES) == 290
    assert (SHAPES[0], SHAPES[1], SHAPES[-1]) == (0.1, 0.11, 2.99)
    assert (np.diff(RATIOS) < 0).all()


def test_the_ratio_of_moments() -> None:
    known = {0.5: 10 / 3, 1.0: 2.0, 1.5: 1.69814, 2.0: math.pi / 2}
    assert {nu: round(moment_ratio(nu), 5) for nu in known} == {nu: round(r, 5) for nu, r in known.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eight_numbers(dtype: torch.dtype) -> None:
    parts = torch.tensor(EIGHT).to(dtype).split([3, 1, 4])
    absolute, square, count = pooled_sums(parts)
    assert count * square / absolute**2 == pytest.approx(1.75778547, abs=1e-8)
    assert fit_shape(absolute, square, count) == 1.35


@pytest.mark.parametrize("nu", [0.5, 1.0, 2.0])
def test_a_sample_has_its_shape(nu: float) -> None:
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / nu, size=1_000_000) ** (1 / nu)
    sums = pooled_sums([torch.from_numpy(0.03 * size * rng.choice([-1, 1], size.size))])
    assert fit_shape(*sums) == pytest.approx(nu, abs=0.02)
    assert fit_scale(nu, *sums[1:]) == pytest.approx(0.03, rel=0.01)


def test_numbers_of_one_size_have_the_largest_shape_and_zeros_too() -> None:
    assert fit_shape(*pooled_sums([torch.tensor([0.3, -0.3])])) == 2.99
    assert fit_shape(*pooled_sums([torch.zeros(3)])) == 2.99
    one_of_many = torch.zeros(10_000)
    one_of_many[0] = 1.0
    assert fit_shape(*pooled_sums([one_of_many])) == 0.1


def test_sums_of_bfloat16_do_not_stop_growing() -> None:
    absolute, square, count = pooled_sums([torch.full((1 << 21,), 0.5, dtype=torch.bfloat16)] * 2)
    assert (absolute, square, count) == (1 << 21, 1 << 20, 1 << 22)


def test_what_can_not_be_fitted() -> None:
    with pytest.raises(OptxError, match="no numbers"):
        fit_shape(*pooled_sums([]))
    with pytest.raises(OptxError, match="infinite, nan"):
        fit_shape(*pooled_sums([torch.tensor([1.0, math.nan])]))


@pytest.mark.parametrize("nu", [0.5, 0.8, 1.0, 2.0, 2.9])
def test_the_density_is_one_with_the_moments(nu: float) -> None:
    scale = unit_scale(nu)
    # w = t^5: the cusp of small shapes and their tails are integrated evenly.
    t = torch.linspace(-3.5, 3.5, 400_001, dtype=torch.float64)
    w = t**5
    f = density(w, nu, scale) * 5 * t**4
    mass, first, second = (torch.trapezoid(f * m, t) for m in (1, w.abs(), w * w))
    assert float(mass) == pytest.approx(1, abs=1e-6)
    assert float(second) == pytest.approx(1, abs=1e-5)
    assert float(second / first**2) == pytest.approx(moment_ratio(nu), abs=1e-5)
