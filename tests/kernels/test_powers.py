"""`optx.ops.fast_power` on a CPU: its numbers, its edges, and that loops of it are loops over vectors."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
import torch

from optx.kernels.cpu_powers import fast_power
from optx.ops import fast_power as on_tensors


@pytest.fixture(scope="module")
def raised() -> Any:
    @numba.njit(["void(f4[::1], f4, f4[::1])", "void(f8[::1], f8, f8[::1])"], error_model="numpy")
    def loop(x: Any, exponent: Any, out: Any) -> None:
        for i in range(x.size):
            out[i] = fast_power(x[i], exponent)

    return loop


def test_the_error(raised: Any) -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0.0, 0.5), (-87.0, 88.0)):
        x = np.exp(rng.uniform(low, high, 100_000)).astype(np.float32)
        for exponent in np.array([-0.9, -0.3, 0.0, 0.5, 0.95], np.float32):
            out = np.empty_like(x)
            raised(x, exponent, out)
            exact = x.astype(np.float64) ** np.float64(exponent)
            allowed = 3e-7 * (1 + np.abs(exponent * np.log2(x.astype(np.float64))))
            assert (np.abs(out / exact - 1) <= allowed).all()


def test_edges(raised: Any) -> None:
    """What is no number stays none; what float32 has no room for stays at its ends."""
    x = np.array([math.nan, -1.0, 1.0, 1e38, 1e-37, 0.0, math.inf], np.float32)
    out = np.empty_like(x)
    raised(x, np.float32(1.9), out)
    assert np.isnan(out[:2]).all()
    assert out[2] == 1.0
    assert out[3] == out[6] == pytest.approx(2.0**127)
    assert out[4] == out[5] == pytest.approx(2.0**-125)


def test_float64_is_exact_and_tensors_are_torchs(raised: Any) -> None:
    x = np.exp(np.random.default_rng(1).uniform(-5, 5, 100))
    out = np.empty_like(x)
    raised(x, 0.35, out)
    np.testing.assert_allclose(out, x**0.35, rtol=1e-15)
    np.testing.assert_allclose(on_tensors(torch.from_numpy(x), 0.35).numpy(), x**0.35, rtol=1e-15)


def test_it_is_computed_in_vectors(raised: Any) -> None:
    """No call of the C library's, one element at a time, in float32."""
    codes = {str(sig): code for sig, code in raised.inspect_llvm().items()}
    (narrow,) = (code for sig, code in codes.items() if "float32" in sig)
    assert "powf" not in narrow
    assert "llvm.pow" not in narrow
    assert " x float> " in narrow
