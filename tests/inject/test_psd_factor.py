"""`optx.PSDFactor`: a weight as U U^T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import optx


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2))


def x() -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_layer_is_the_product_and_merges_into_it(rank: Any) -> None:
    model = net()
    handle = optx.attach(model, optx.PSDFactor(rank, alpha=0.5, seed=3), targets="0")
    U = model[0].optx.psd_factor.U
    assert U.shape == (5, rank or 5)
    expected = model[1:](F.linear(x(), U @ U.t(), model[0].bias))
    found = model(x())
    assert torch.allclose(found, expected, atol=1e-6)
    handle.merge()
    assert torch.equal(model[0].weight, U @ U.t())
    assert torch.allclose(model(x()), found, atol=1e-6)


def test_its_start() -> None:
    found = [optx.attach(net(), optx.PSDFactor(alpha=1e-2, seed=s), targets="0") for s in (0, 0, 1)]
    a, b, c = (handle.parameters()[0].detach() for handle in found)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert 0.2 < float(a.std()) / (1e-2 / 5**0.5) < 2
    model = net()
    with torch.no_grad():
        half = torch.randn(5, 2)
        model[0].weight.copy_(half @ half.t())
    before = model(x())
    optx.attach(model, optx.PSDFactor(rank=2, init="fit"), targets="0")
    assert torch.allclose(model(x()), before, atol=1e-5)


def test_the_fit_is_the_closest_there_is() -> None:
    """Of -I nothing is left; of a rotation the symmetric part."""
    model = net()
    with torch.no_grad():
        model[0].weight.copy_(-torch.eye(5))
    handle = optx.attach(model, optx.PSDFactor(init="fit"), targets="0")
    assert not handle.parameters()[0].any()


def test_an_optimizer_follows_and_recovers_a_matrix() -> None:
    """A layer that is to be a projector of rank 2 learns it from absolute errors, with outliers."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 2, generator=generator))[0]
    inputs = torch.randn(400, 5, generator=generator)
    outputs = inputs @ basis @ basis.t()
    outputs[torch.rand(400, 5, generator=generator) < 0.2] += 10
    layer = nn.Sequential(nn.Linear(5, 5, bias=False))
    base = torch.optim.SGD(layer.parameters(), lr=1.0)
    handle = optx.attach(layer, optx.PSDFactor(alpha=1e-3, seed=0), targets="0")
    opt = optx.wrap(base, handle, optx.SubGM(0.3, 0.97), fused=False)
    for _ in range(300):
        opt.zero_grad()
        (layer(inputs) - outputs).abs().mean().backward()
        opt.step()
    handle.merge_and_unload()
    assert float((layer[0].weight - basis @ basis.t()).detach().norm()) < 0.01
    assert opt.param_groups[0]["params"] == [layer[0].weight]


def spoilt() -> nn.Sequential:
    model = net()
    nn.init.constant_(model[0].weight, torch.nan)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: optx.PSDFactor(rank=0), "rank is 0"),
        (lambda: optx.PSDFactor(alpha=0.0), "alpha is 0"),
        (lambda: optx.PSDFactor(init="svd"), "init is 'svd'"),
        (lambda: optx.attach(net(), optx.PSDFactor()), "have to be named.* or .all-linear. where"),
        (lambda: optx.attach(net(), optx.PSDFactor(), targets="2"), "has 5 inputs and 2 outputs"),
        (lambda: optx.attach(net(), optx.PSDFactor(rank=6), targets="0"), "rank=6 is above the size"),
        (lambda: optx.attach(net(), optx.PSDFactor(), targets="1"), "is a Tanh"),
        (
            lambda: optx.attach(spoilt(), optx.PSDFactor(init="fit"), targets="0"),
            "'0': its weight has inf or",
        ),
    ],
)
def test_what_it_refuses(make: Any, said: str) -> None:
    with pytest.raises(optx.OptxError, match=said):
        make()
