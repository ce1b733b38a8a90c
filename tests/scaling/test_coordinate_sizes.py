"""What the coordinate check measures: sizes, updates and changes by hand; slopes, and their judgement."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mup_by_hand import batch
from torch import Tensor, nn

from optx.scaling import coordinate_check
from optx.scaling._coordinate_result import LayerSizes, judged, slope

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny tensors


def test_sizes_by_hand():
    """One layer, one step of SGD: output, own update and change, in both norms, at both widths."""
    x = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    target = torch.zeros(2, 4)

    def make(width: int) -> nn.Module:
        model = nn.Linear(2, width, bias=False)
        model.weight.data = torch.arange(2.0 * width).reshape(width, 2) / width
        return model

    def size(y: Tensor, norm: str) -> float:
        return float(y.abs().mean() if norm == "l1" else y.square().mean().sqrt())

    for norm in ("l1", "l2"):
        check = coordinate_check(
            make,
            [2, 4],
            (x, target),
            loss_fn=lambda y, _: y.square().sum() / 2,
            optimizer="sgd",
            lr=0.1,
            steps=1,
            seeds=1,
            norm=norm,
        )
        found = check.layers[""]
        for i, width in enumerate((2, 4)):
            w0 = make(width).weight.detach()
            w1 = w0 - 0.1 * (x @ w0.T).T @ x
            assert found.input[0, i] == pytest.approx(size(x, norm))
            assert found.output[0, i] == pytest.approx([size(x @ w.T, norm) for w in (w0, w1)])
            assert found.update[0, i] == pytest.approx([0.0, size(x @ (w1 - w0).T, norm)])
            assert found.change[0, i] == pytest.approx([0.0, size(x @ (w1 - w0).T, norm)])
        assert found.has_weights
        assert not found.finite_output
        assert not found.sampled


def test_an_own_update_is_not_what_the_layers_before_did():
    """Only the first layer is trained: the second's output changes, by none of its own doing."""

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 3))
        return model, torch.optim.SGD(model[0].parameters(), lr=0.1)

    check = coordinate_check(make, [8, 16], batch(), seeds=1)
    assert np.all(check.layers["1"].update == 0)
    assert np.all(check.layers["1"].change[..., 1:] > 0)
    assert np.all(check.layers["0"].update[..., 1:] == check.layers["0"].change[..., 1:])
    assert math.isnan(check.updates["1"][0])


def test_a_layer_with_randomness_of_its_own_is_asked_again_with_the_same():
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5)

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(Noisy(8, width), nn.Linear(width, 3))
        return model, torch.optim.SGD(model[1].parameters(), lr=0.1)

    check = coordinate_check(make, [16, 32], batch(), seeds=1)
    assert np.all(check.layers["0"].update == 0)
    assert np.all(check.layers["0"].change == 0)


def test_changes_of_large_outputs_are_estimates_and_say_so():
    def make(width: int) -> nn.Module:
        return nn.Linear(8, width)

    targets = torch.zeros(32, 1)
    options: dict[str, Any] = {
        "optimizer": "sgd",
        "loss_fn": lambda y, _: (y - targets).square().mean(),
        "seeds": 1,
        "lr": 1.0,
    }
    exact = coordinate_check(make, [64, 128], batch(), **options)
    rough = coordinate_check(make, [64, 128], batch(), sample=500, **options)
    assert rough.layers[""].sampled
    assert not exact.layers[""].sampled
    assert np.array_equal(rough.layers[""].output, exact.layers[""].output)
    assert rough.layers[""].change[..., 1:] == pytest.approx(exact.layers[""].change[..., 1:], rel=0.15)
    assert not np.array_equal(rough.layers[""].change, exact.layers[""].change)


@given(st.floats(-2, 2), st.floats(-5, 5), st.sets(st.integers(1, 4096), min_size=2, max_size=6))
def test_a_slope_is_the_exponent(exponent, constant, widths):
    sizes = np.array([math.exp(constant) * w**exponent for w in sorted(widths)])
    assert slope(sorted(widths), sizes) == pytest.approx(exponent, abs=1e-9)


@settings(max_examples=60)
@given(st.floats(-1, 1), st.floats(-1, 1), st.booleans())
def test_a_layer_fails_where_it_and_its_gain_stray_alike(inputs, gain, finite):
    """Inputs that stray are somebody else's fault, and an output whose size is right is nobody's."""
    widths = [8, 32, 128]
    given_ = np.array([[[w**inputs] * 2 for w in widths]])
    out = np.array([[[w ** (inputs + gain)] * 2 for w in widths]])
    zeros = np.zeros_like(out)
    sizes = LayerSizes(out, given_, zeros, zeros, finite, has_weights=True, sampled=False)
    own, tolerance = inputs + gain, 0.25
    if any(abs(abs(value) - tolerance) < 1e-3 for value in (own, gain)):
        return
    grows, shrinks = min(own, gain) > tolerance, max(own, gain) < -tolerance
    check = judged(widths, tolerance, {"layer": sizes})
    unexplained = own > tolerance and not grows
    assert bool(check.failures) == (grows or (shrinks and not finite) or unexplained)
    for name, value in (("slopes", own), ("gains", gain)):
        assert getattr(check, name)["layer"] == pytest.approx((value, value), abs=1e-6)


def test_what_chance_may_have_made_is_told_and_is_no_failure():
    widths = [2, 4]
    out = np.array([[[1.0], [1.0]], [[1.0], [4.0]]])  # slopes 0 and 2: 1.32 of the means, give or take 1
    ones = np.ones_like(out)
    check = judged(widths, 0.25, {"a": LayerSizes(out, ones, 0 * out, 0 * out, False, True, False)})
    assert check.ok
    assert "grows as width^1.32" in check.unsure["a"]
    assert "more seeds" in str(check)
    assert "unsure" in check.table()
    steady = np.array([[[1.0], [2.0]], [[1.0], [2.2]]])
    sure = judged(widths, 0.25, {"a": LayerSizes(steady, ones, 0 * out, 0 * out, False, True, False)})
    assert list(sure.failures) == ["a"]
    assert not sure.unsure


def test_standard_errors_are_over_seeds():
    widths = [2, 4]
    out = np.array([[[1.0], [2.0]], [[1.0], [8.0]]])  # slopes 1 and 3
    zeros = np.zeros_like(out)
    check = judged(widths, 9.0, {"a": LayerSizes(out, out, zeros, zeros, False, False, False)})
    assert check.errors["a"] == pytest.approx((1.0,))
    assert check.slopes["a"] == pytest.approx((math.log2(5),))
    one = judged(widths, 9.0, {"a": LayerSizes(out[:1], out[:1], zeros[:1], zeros[:1], False, False, False)})
    assert math.isnan(one.errors["a"][0])
