"""Sums over rows and columns of whatever shape, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@optx.rule(writes="row")
def along_row(w: Any, g: Any) -> Any:
    return w * g


@optx.rule(writes="column")
def along_column(w: Any, g: Any) -> Any:
    return w * g


@optx.rule(writes="of_row")
def keep_row(row: Any) -> Any:
    return row * 1.0


@optx.rule(writes="of_column")
def keep_column(column: Any) -> Any:
    return column * 1.0


class Sums(optx.Transform):
    """Keeps them."""

    name = "sums"
    slots = {"of_row": optx.per_row(), "of_column": optx.per_column()}  # noqa: RUF012
    rules = {  # noqa: RUF012
        **{"row_sums": along_row, "column_sums": along_column},
        **{"rows": keep_row, "columns": keep_column},
    }


lengths = st.integers(0, 40)
shapes = st.one_of(
    st.tuples(lengths, lengths),
    st.tuples(st.just(1), st.integers(1, 3000)),
    st.tuples(st.integers(1, 3000), st.just(1)),
    st.tuples(st.integers(1, 4), st.integers(127, 400)),
    st.tuples(lengths),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 5)),
    st.just(()),
)


def close(found: Tensor, terms: Tensor, dim: int) -> None:
    """A float64 sum, rounded to float32 where it is kept."""
    wanted, size = terms.sum(dim), terms.abs().sum(dim)
    assert found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= 1.2e-7 * wanted.abs() + 1e-13 * size).all())


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(
    ("fused", "dtype"), [("cpu", F32), ("cpu", BF16), (False, F32), (False, F64), (False, BF16)], ids=str
)
@settings(max_examples=25, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=3), st.integers(0, 999))
@example([(2, 9000), (3, 8193)], 0)  # rows of several tiles
@example([(3000, 30), (70_001, 1), (1, 70_001)], 1)  # several tiles of rows; parts of threads
def test_they_are_torchs_in_float64(
    fused: Any, dtype: torch.dtype, some: list[tuple[int, ...]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        spread = torch.randn(shape, generator=generator, dtype=F64)
        return (spread.exp2() * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)

    weights = [nn.Parameter(draw(shape)) for shape in some]
    opt = optx.wrap(torch.optim.SGD(weights, lr=1e-3), Sums(), fused=fused)
    terms: list[Tensor] = []
    for p in weights:
        p.grad = draw(tuple(p.shape))
        matrix = p.shape if p.ndim == 2 else (p.shape[0], p[:1].numel()) if p.ndim > 1 else (1, p.numel())
        terms.append((p.detach().double() * p.grad.double()).reshape(matrix))
    opt.step()
    for p, of in zip(weights, terms, strict=True):
        close(opt.slot(p, opt.sums, "of_row"), of, 1)  # type: ignore[attr-defined]
        close(opt.slot(p, opt.sums, "of_column"), of, 0)  # type: ignore[attr-defined]
