"""Sums over rows and columns in generated Triton code, against the CPU's kernels and torch's own step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

sys.path.insert(0, str(Path(__file__).parents[1] / "step"))
from test_levels import Matrices, draw

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# A row; none; a tail; few long rows, on blocks of 1024 columns; rows of several blocks, aligned and not; a
# column; several stretches of 32 rows or columns.
SHAPES = [
    (5,),
    (),
    (0,),
    (3, 7),
    (4, 3, 2, 2),
    (0, 4),
    (4, 0),
    (2, 1500),
    (5, 256),
    (6, 133),
    (70, 1),
    (40, 16),
]


def stepped(
    fused: Any,
    make: Callable[[Any], torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    dtype: Any,
    *chain: Any,
) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(w.to(dtype)) for w in draw(shapes, 3, F32)]
    opt = optx.wrap(make(weights), *chain, fused=fused)
    for seed in range(2):
        for p, g in zip(weights, draw(shapes, 50 + seed, F32), strict=True):
            p.grad = g.to(dtype)
        opt.step()
    assert opt.plan()[0].path == ("fused triton" if fused else "foreach")
    return weights, opt


def test_numbers_per_row_and_column() -> None:
    (found, opt), (wanted, plain) = (
        stepped(fused, lambda w: torch.optim.SGD(w, lr=0.1), SHAPES, F32, Matrices())
        for fused in ("triton", False)
    )
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        for name in ("usual", "seen", "spread"):
            kept = [o.slot(one, o.matrices, name) for one, o in ((p, opt), (q, plain))]  # type: ignore[attr-defined]
            torch.testing.assert_close(*kept, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_draws_of_bfloat16_do_not_repeat() -> None:
    """Nor where rows do not begin at a multiple of eight elements."""
    shapes = [(300, 12)]
    weights = [nn.Parameter(torch.ones(shapes[0], dtype=BF16))]
    opt = optx.wrap(torch.optim.SGD(weights, lr=1.0), Centred(), fused="triton")
    weights[0].grad = torch.full(shapes[0], 2**-9, dtype=BF16)
    opt.step()
    up = (weights[0].detach() != 1.0).double()
    assert 0.34 < up.mean() < 0.41  # three quarters of half a spacing
    rows = up - up.mean(0)
    same = (rows[:-1] * rows[1:]).mean(0) / rows.square().mean(0).clamp(min=1e-9)
    assert same.abs().max() < 0.3  # five standard deviations
    assert len(up.unique(dim=0)) > 250


@optx.rule(writes="row_g")
def across(g: Any) -> Any:
    return g * 1.0


@optx.rule(writes="g")
def centre(g: Any, row_g: Any, columns: Any) -> Any:
    return g - 0.25 * row_g / columns


class Centred(optx.Transform):
    name = "centred"
    rules = {"row_sums": across, "gradient": centre}  # noqa: RUF012


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_adafactor(dtype: torch.dtype) -> None:
    """A number of the tensor from its rows, which the elements read; state per row and column."""
    shapes = [(3, 7), (40, 16), (9, 140)]
    make: Any = lambda w: torch.optim.Adafactor(w, lr=0.01, weight_decay=0.1)  # noqa: E731
    found, _ = stepped("triton", make, shapes, dtype)
    wanted, _ = stepped(False, make, shapes, dtype)
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
