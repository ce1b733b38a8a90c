"""Triton kernels of shared weights, in the interpreter, against torch's operations and the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from optx.kernels.shared import cpu, gather_triton, mapping
from optx.kernels.shared.mapping import Place

SIZES = [(1, 300, 1), (9 * 1024 + 5, 333, 41), (1024, 1024, 32)]


@pytest.mark.parametrize("kind", ["fold", "hashed", "roast"])
@pytest.mark.parametrize(("numel", "slots", "cols"), SIZES)
def test_equals_the_cpu_kernels(kind: str, numel: int, slots: int, cols: int) -> None:
    place = Place(kind, slots, 70, numel, -5, 0.7, 3, cols)
    psi = torch.randn(slots)
    for dtype in (torch.float32, torch.bfloat16) if kind == "fold" else (torch.float32,):
        assert torch.equal(gather_triton.gather(psi, place, dtype), mapping.gather(psi, place, dtype))
        values = torch.randn(numel).to(dtype)
        for signed in (True, False):
            found = gather_triton.scatter(values, place, torch.float32, signed)
            wanted = cpu.scatter(values, place, torch.float32, signed)
            if kind == "fold":  # the same order
                assert torch.equal(found, wanted)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_shows() -> None:
    for kind in ("fold", "hashed"):
        place = Place(kind, 30, 0, 60, 1, 1.0)
        values = torch.ones(60)
        values[7] = float("inf")
        assert not gather_triton.scatter(values, place, torch.float32).isfinite().all()
