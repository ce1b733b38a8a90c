"""SparseGPT against NumPy, and what its updates are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_by_hand import sparsegpt
from torch import Tensor, nn

import optx


def correlated(tokens: int, width: int, seed: int) -> Tensor:
    """Inputs that depend on one another: a few directions have most of it, as in models."""
    torch.manual_seed(seed)
    sizes = 1 / torch.arange(1, width + 1)
    return torch.randn(tokens, width) * sizes @ torch.randn(width, width)


def pruned(weight: Tensor, x: Tensor, method: Any) -> tuple[Tensor, Tensor]:
    """The mask and the new weight of one layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    masks = optx.prune(layer, method, [x])
    return masks["weight"], layer.weight.detach()


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 6).map(lambda k: 4 * k),
    sparsity=st.floats(0, 0.99),
    pattern=st.sampled_from([None, "1:2", "2:4", "3:4"]),
    block=st.integers(1, 30),
    dead=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_mask_and_weights_are_those_of_the_algorithm_written_out(
    rows: int, width: int, sparsity: float, pattern: str | None, block: int, dead: int, seed: int
) -> None:
    x = correlated(3 * width, width, seed).double()
    x[:, :dead] = 0
    weight = torch.randn(rows, width, dtype=torch.float64)
    groups = tuple(map(int, pattern.split(":"))) if pattern else None
    method = (
        optx.SparseGPT(pattern=pattern, block=block) if pattern else optx.SparseGPT(sparsity, block=block)
    )
    kept, new = pruned(weight, x, method)
    gone, want = sparsegpt(weight.numpy(), x.numpy(), sparsity, groups, block=block)
    assert np.array_equal(~kept.numpy(), gone)
    assert gone.sum() == (
        weight.numel() * groups[0] // groups[1] if groups else int(weight.numel() * sparsity)
    )
    np.testing.assert_allclose(new.numpy(), want, rtol=1e-8, atol=1e-8)
    assert (new[~kept] == 0).all()


def test_inputs_that_are_independent_and_alike_make_it_magnitude_and_change_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    x = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q.float()  # x^T x = I
    kept, new = pruned(weight, x, optx.SparseGPT(0.5))
    assert torch.equal(kept, optx.Magnitude(0.5).prune_matrix(weight)[0])
    torch.testing.assert_close(new, weight * kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [optx.SparseGPT(0.5), optx.SparseGPT(pattern="2:4")])
def test_what_is_kept_makes_up_for_what_goes(method: optx.SparseGPT) -> None:
    by_mask, by_magnitude = [], []
    for seed in range(5):
        x = correlated(200, 64, seed)
        weight = torch.randn(32, 64)
        kept, new = pruned(weight, x, method)
        least, _ = optx.Magnitude(pattern=method.pattern).prune_matrix(weight)
        error = float(((new - weight) @ x.t()).norm())
        by_mask.append(error / float(((weight * kept - weight) @ x.t()).norm()))
        by_magnitude.append(error / float(((weight * least - weight) @ x.t()).norm()))
    assert max(by_mask) < 0.9
    assert max(by_magnitude) < 0.9


def test_float32_is_near_float64() -> None:
    x, weight = correlated(300, 96, 1), torch.randn(24, 96)
    kept, new = pruned(weight, x, optx.SparseGPT(0.6))
    kept64, new64 = pruned(weight.double(), x.double(), optx.SparseGPT(0.6))
    assert (kept != kept64).float().mean() < 2e-3
    same = kept == kept64
    torch.testing.assert_close(new[same].double(), new64[same], rtol=0, atol=2e-2)


def test_a_depthwise_convolution_has_exact_counts() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, groups=6)
    masks = optx.prune(conv, optx.SparseGPT(0.5), [torch.randn(2, 6, 8, 8)])
    assert int((~masks["weight"]).sum()) == 27  # of 54; group by group it would be 24


def test_a_hessian_that_is_singular() -> None:
    x = torch.randn(3, 1).expand(3, 8).contiguous()
    with pytest.raises(optx.OptxError, match="SparseGPT: the Hessian of 'weight' is singular at damping=0"):
        pruned(torch.randn(4, 8), x, optx.SparseGPT(0.5, damping=0))


@pytest.mark.parametrize("options", [{"damping": -1}, {"block": 0}, {"granularity": "row"}])
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(optx.OptxError, match=next(iter(options))):
        optx.SparseGPT(**options)  # type: ignore[arg-type]
