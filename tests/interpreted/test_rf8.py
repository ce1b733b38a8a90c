"""RF8's Triton kernels in the interpreter, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from optx.kernels.rf8 import codes_triton, cpu, product_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1023, 4097, codes_triton.BLOCK * codes_triton.TURNS + 5])
def test_codes_equal_the_cpu_kernels(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    octaves = torch.randint(-20, 3, (n,), generator=generator)
    w = (torch.randn(n, generator=generator) * torch.exp2(octaves.float())).to(dtype)
    assert codes_triton.largest(w) == cpu.largest(w)
    for e_max, factor in ((3, 1.0), (-128, 2.0**-100), (127, 2.0**124)):
        some = w if dtype == torch.float16 else w * factor
        mine, theirs = torch.full((2, n + 1), 7, dtype=torch.uint8)
        codes_triton.pack(some, mine[:n], e_max)
        cpu.pack(some, theirs[:n], e_max)
        assert torch.equal(mine, theirs)
        wide, wanted = torch.full((2, n + 1), 7.0, dtype=dtype)
        codes_triton.unpack(mine[:n], wide[:n], e_max)
        cpu.unpack(theirs[:n], wanted[:n], e_max)
        assert torch.equal(wide, wanted)
        assert wide[n] == 7
    mine, theirs = torch.full((2, n + 1), 7.0, dtype=dtype)
    codes_triton.quantise(w, mine[:n])
    cpu.quantise(w, theirs[:n])
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("e_max", [-128, 0, 127])
def test_every_byte(e_max: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    mine, theirs = torch.empty(2, 256)
    codes_triton.unpack(codes, mine, e_max)
    cpu.unpack(codes, theirs, e_max)
    assert torch.equal(mine, theirs)


def test_nothing_to_do() -> None:
    codes_triton.pack(torch.empty(0), torch.empty(0, dtype=torch.uint8), 0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 300), (16, 512), (9, 1040), (8, 1536)])
def test_products_equal_the_cpu_kernels(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (rows, columns), dtype=torch.uint8, generator=generator)
    for batch in (1, product_triton.MOST):
        x = torch.randn(batch, columns, generator=generator)
        mine, theirs = torch.full((2, batch * rows + 1), 7.0)
        product_triton.multiply(codes, x, mine[:-1].view(batch, rows), -8)
        cpu.multiply(codes, x, theirs[:-1].view(batch, rows), -8)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
        assert mine[-1] == 7
