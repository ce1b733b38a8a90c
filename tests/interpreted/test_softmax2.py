"""Softmax's Triton kernels in the interpreter, beside the CPU's."""

from __future__ import annotations

import math

import pytest
import torch

from optx.kernels.softmax import cpu
from optx.kernels.softmax import pairs_triton as device

INF, NAN = math.inf, math.nan
# The interpreter rounds a fused product, so that exponentials of large numbers lose digits.
APART = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FITS", 64), ("BLOCK", 64), ("TURNS", 2), ("FEW", 8)):
        monkeypatch.setattr(device, name, value)


def log_sum(sums: torch.Tensor) -> torch.Tensor:
    m, n, shift = sums.double().unbind(-1)
    return m.log() + n * math.log(2) + shift


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        *((n, torch.float32) for n in (1, 63, 65, 700)),
        (300, torch.float64),
        (300, torch.bfloat16),
        (300, torch.float16),
    ],
)
def test_kernels_are_the_cpus(count: int, dtype: torch.dtype) -> None:
    """Rows that fit a program, that one program reads, and that several do."""
    generator = torch.Generator().manual_seed(count)
    for rows in (2, 9):
        band = torch.full((rows, count + 9), NAN, dtype=dtype)  # unaligned rows between guards
        x = band[:, 5 : 5 + count].copy_(torch.randn(rows, count, generator=generator) * 4)
        x[0, count // 2 :] = -INF if count > 1 else 0.0
        grad = torch.randn(rows, count, generator=generator).to(dtype)
        scale, lone = torch.rand(2, rows, generator=generator).to(cpu.fold(x).dtype)
        scale[1] = 0.0
        labels = torch.randint(count, (rows,), generator=generator)
        found = [
            [
                y := kernels.softmax(x),
                kernels.backward(grad, y),
                log_sum(sums := kernels.fold(x)),
                kernels.spread(x, sums, scale, None, None),
                kernels.spread(x, sums, scale, labels, lone),
            ]
            for kernels in (device, cpu)
        ]
        for mine, theirs in zip(*found, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=APART[dtype], atol=APART[dtype])
        assert not found[0][3][1].any()


def test_odd_rows() -> None:
    """Beyond the range a row is read once more; nan, inf and rows of -inf are as on the CPU."""
    odd = [
        *([-INF, -INF], [INF, 1.0], [NAN, 1.0], [-INF, 3.0], [INF, NAN], [-INF, NAN], [-INF, INF]),
        *([1e30, 1e30], [-3.4e38, -3.4e38], [1e38, -1e38], [5e6, 5e6 + 1.5], [-1e30, -INF]),
    ]
    for repeats in (20, 50):  # what fits a program, and what does not
        x = torch.tensor(odd).repeat_interleave(repeats, 1)
        for name in ("softmax", "fold"):
            mine, theirs = (getattr(kernels, name)(x).double() for kernels in (device, cpu))
            if name == "fold":
                mine, theirs = log_sum(mine), log_sum(theirs)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_no_rows() -> None:
    x = torch.empty(0, 5)
    assert device.softmax(x).shape == device.backward(x, x).shape == (0, 5)
    assert device.fold(x).shape == (0, 3)
