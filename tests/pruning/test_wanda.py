"""Wanda against NumPy: the same masks, exact counts, rows and groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_by_hand import wanda
from torch import nn

import optx


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs of very different sizes that depend on one another."""
    torch.manual_seed(seed)
    return torch.randn(tokens, width) @ torch.randn(width, width) * torch.rand(width).mul(3).exp()


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 5).map(lambda k: 4 * k),
    sparsity=st.floats(0, 0.99),
    kind=st.sampled_from(["row", "layer", "1:2", "2:4", "3:4"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_mask_is_that_of_the_paper_written_out(
    rows: int, width: int, sparsity: float, kind: str, seed: int
) -> None:
    x = correlated(17, width, seed)
    model = nn.Sequential(nn.Linear(width, rows, bias=False))
    dense = model[0].weight.detach().clone()
    groups = tuple(map(int, kind.split(":"))) if ":" in kind else None
    method = optx.Wanda(pattern=kind) if groups else optx.Wanda(sparsity, granularity=kind)
    masks = optx.prune(model, method, list(x.split(5)))
    gone = wanda(dense.double().numpy(), x.double().numpy(), sparsity, groups, kind == "layer")  # type: ignore[arg-type]
    assert np.array_equal(~masks["0.weight"].numpy(), gone)
    assert torch.equal(model[0].weight, dense * masks["0.weight"])


def test_inputs_that_are_all_alike_make_it_magnitude_by_rows() -> None:
    torch.manual_seed(0)
    weight, model = torch.randn(8, 16), nn.Linear(16, 8)
    model.weight.data.copy_(weight)
    signs = torch.randn(30, 16).sign()
    masks = optx.prune(model, optx.Wanda(0.3), [signs])
    kept, _ = optx.Magnitude(0.3, granularity="row").prune_matrix(weight)
    assert torch.equal(masks["weight"], kept)
    assert (~kept).sum(1).tolist() == [4] * 8


def test_a_convolution_by_all_that_its_kernel_sees() -> None:
    torch.manual_seed(0)
    shape = {"stride": 2, "padding": 1, "dilation": 2}
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False, **shape)
    dense = conv.weight.detach().clone()
    x = torch.randn(3, 4, 9, 9) * torch.tensor([1, 5, 0.2, 3]).view(4, 1, 1)
    output = conv(x).detach()
    masks = optx.prune(conv, optx.Wanda(0.5), [x])
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        places = nn.functional.unfold(x[:, 2 * group : 2 * group + 2], 3, **shape)
        seen, weight = places.transpose(1, 2).reshape(-1, 18), dense[rows].flatten(1)
        made = (seen @ weight.t()).view(3, -1, 3).transpose(1, 2)
        torch.testing.assert_close(made, output[:, rows].flatten(2))  # so these are its inputs
        gone = wanda(weight.double().numpy(), seen.double().numpy(), 0.5)
        assert np.array_equal(~masks["weight"][rows].flatten(1).numpy(), gone)


def test_granularity_that_is_none() -> None:
    with pytest.raises(optx.OptxError, match="granularity is 'column'"):
        optx.Wanda(granularity="column")
