"""The Triton kernel that decodes compressed deltas, in the interpreter, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optx.kernels.ternary import cpu as ternary_cpu
from optx.kernels.ternary import dense_triton as ternary

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def masks_of(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random masks, and the ternary vector they stand for."""
    t = torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(seed))
    masks = torch.empty(2, -(-n // 64), dtype=torch.int64)
    ternary_cpu.pack(t.float(), masks, 1)
    return masks, t


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 33, 64, 1023, 4096, 4097, ternary.BLOCK * ternary.TURNS + 5])
def test_equals_the_cpu_kernels(n: int, dtype: torch.dtype) -> None:
    masks, t = masks_of(n)
    scale = float(torch.tensor(0.3))
    band = torch.full((n + 2,), 7.0, dtype=dtype)
    to = band[1:-1] if dtype != torch.bfloat16 else band[:-2]
    ternary.fill(to, masks, scale)
    assert torch.equal(to, (t * torch.tensor(scale, dtype=torch.float64)).to(torch.float32).to(dtype))
    assert set(band[n + 1 :].tolist()) == {7.0}
    start = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine, theirs = start.clone(), start.clone()
    ternary.add(mine, masks, scale)
    ternary_cpu.add(theirs, masks, scale)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, start)


def test_nothing_to_do() -> None:
    ternary.add(torch.empty(0), torch.empty(2, 0, dtype=torch.int64), 1.0)


def test_special_values_stay() -> None:
    masks, _ = masks_of(4, seed=3)
    for dtype in DTYPES:
        weights = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], dtype=dtype)
        ternary.add(weights, masks, 1.0)
        assert weights[:2].tolist() == [float("inf"), float("-inf")]
        assert weights[2].isnan()
