"""A thin product in the order that MKL vectorises is the same product, forwards, backwards and twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optx.inject._weights import add_product, low_product


def moved(x: Tensor, down: Tensor, up: Tensor, base: Tensor, owned: bool) -> Tensor:
    return add_product(base * 1, low_product(x, down), up, 0.5, owned=owned)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (1, 1), (2, 0), (2, 3, 2)])
@pytest.mark.parametrize("rank", [1, 3, 8, 9])
def test_equals_two_linears(rank: int, lead: tuple[int, ...], owned: bool) -> None:
    draws = torch.Generator().manual_seed(rank)
    shapes = ((*lead, 11), (rank, 11), (6, rank), (*lead, 6))
    given = [torch.randn(shape, generator=draws, requires_grad=True) for shape in shapes]
    x, down, up, base = given
    wanted = base + 0.5 * F.linear(F.linear(x, down), up)
    got = moved(x, down, up, base, owned)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(wanted.shape, generator=draws)
    for one, two in zip(
        torch.autograd.grad((got * weight).sum(), given),
        torch.autograd.grad((wanted * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_narrow_products_lie_by_rank() -> None:
    x = torch.randn(2, 5, 11)
    assert low_product(x, torch.randn(8, 11)).stride() == (5, 1, 10)
    assert low_product(x, torch.randn(9, 11)).is_contiguous()


def test_second_derivatives_and_transforms() -> None:
    draws = torch.Generator().manual_seed(0)
    x, down, up, base = (
        torch.randn(s, generator=draws, dtype=torch.float32) for s in ((2, 3, 4), (2, 4), (5, 2), (2, 3, 5))
    )

    def energy(down: Tensor, product: bool) -> Tensor:
        plain = base + 0.5 * F.linear(F.linear(x, down), up)
        return (moved(x, down, up, base, True) if product else plain).pow(3).sum()

    hessians = [torch.autograd.functional.hessian(lambda d, p=p: energy(d, p), down) for p in (True, False)]
    torch.testing.assert_close(*hessians)
    per_sample = torch.func.vmap(lambda x, base: moved(x, down, up, base, True))(x, base)
    torch.testing.assert_close(per_sample, moved(x, down, up, base, True))
