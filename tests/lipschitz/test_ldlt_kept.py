"""LDLT with weights that are kept, and with convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, snapshot
from ldlt_models import Skip, convs
from ldlt_reference import layers, mlp, spoil, steepest
from torch import nn
from torch.nn import functional as F

import optx

# ---- weights that are kept ---------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    kind=st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Sigmoid]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_weights_are_kept_at_the_smallest_L_and_above(
    sizes: list[int], kind: type[nn.Module], dtype: torch.dtype, scale: float, seed: int
) -> None:
    model = mlp(sizes, kind, seed).to(dtype)
    with torch.no_grad():
        for path in layers(model):
            model.get_parameter(f"{path}.weight").mul_(scale)
    norms = [
        float(torch.linalg.matrix_norm(model.get_parameter(f"{p}.weight").detach(), 2)) for p in layers(model)
    ]
    slope = 0.25 if kind is nn.Sigmoid else 1.0
    product = float(torch.tensor(norms).prod()) * slope ** (len(norms) - 1)
    x = torch.randn(5, sizes[0], dtype=dtype)
    before = model(x).detach()
    handle = optx.attach(model, optx.LDLT("auto"), layers(model))
    assert handle.certificate().holds
    assert product * 1.0015 >= handle.L
    close = 2e-4 if dtype == torch.float32 else 1e-9
    assert torch.allclose(model(x), before, rtol=close, atol=close * max(1.0, product))
    handle.remove()
    assert torch.equal(model(x), before)
    above = optx.attach(model, optx.LDLT(3.0 * product, init="keep"), layers(model))
    assert torch.allclose(model(x), before, rtol=close, atol=close * max(1.0, product))
    above.remove()
    with pytest.raises(optx.TargetError, match="smallest L that works is"):
        optx.attach(model, optx.LDLT(handle.L * 0.99, init="keep"), layers(model))


@pytest.mark.parametrize(("skip", "deep"), [(True, False), (True, True), (False, False)])
def test_residual_weights_are_kept(skip: bool, deep: bool) -> None:
    model = Skip(skip, deep)
    x = torch.randn(6, 4)
    before = model(x).detach()
    handle = optx.attach(model, optx.LDLT("auto", residual=True), layers(model))
    assert torch.allclose(model(x), before, atol=1e-5)
    found = handle.certificate()
    assert found.holds
    assert (found.first, found.last) == ("fc1", "out")
    bare = 1.0 if not skip else float(torch.linalg.matrix_norm(model.skip.weight.detach(), 2))
    assert bare * 0.5 < found.L
    assert steepest(handle.merge_and_unload().double(), [4], 5000, 50) <= found.L


@pytest.mark.parametrize(
    ("model", "L", "words"),
    [
        (Skip(False), 0.9, "L must be at least 1"),
        (Skip(False, deep=True), 1.0, "have 3 layers"),
        (Skip(False, act=F.leaky_relu), 1.0, "slopes from 0.01"),
        (mlp([4, 6, 4]), 1.0, "found no such sum behind"),
    ],
)
def test_residual_chains_that_are_refused(model: nn.Module, L: float, words: str) -> None:
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=words):
        optx.attach(model, optx.LDLT(L, residual=True), layers(model))
    assert_same(model, before)


# ---- convolutions -------------------------------------------------------------------------------------


def test_convolutions_are_certified_on_images_of_any_size() -> None:
    for scale in (0.1, 1.0, 20.0):
        model = convs().eval()
        handle = optx.attach(model, optx.LDLT(0.7), layers(model))
        spoil(handle, scale)
        assert handle.certificate(shape=(2, 8, 8)).holds
        assert steepest(handle.merge_and_unload().double(), [2, 8, 8], 500, 30) <= 0.7 * (1 + 1e-5)
    only = nn.Sequential(nn.Conv1d(3, 5, 4, dilation=2, padding=3), nn.ReLU(), nn.Conv1d(5, 2, 3, stride=2))
    handle = optx.attach(only, optx.LDLT(1.3), ["0", "2"])
    spoil(handle, 3.0)
    for length in (9, 16, 31):
        assert handle.certificate(shape=(3, length)).holds
    with pytest.raises(optx.OptxError, match="shape is None; the chain has convolutions"):
        handle.certificate()
    with pytest.raises(optx.OptxError, match=r"\(3, \.\.\.\)"):
        handle.certificate(shape=(2, 9))


def test_weights_of_convolutions_are_kept() -> None:
    model, x = convs().eval(), torch.randn(3, 2, 8, 8)
    before = model(x).detach()
    handle = optx.attach(model, optx.LDLT("auto"), layers(model))
    assert torch.allclose(model(x), before, atol=1e-6)
    assert handle.certificate((2, 8, 8)).holds
    assert handle.L < 3.0
