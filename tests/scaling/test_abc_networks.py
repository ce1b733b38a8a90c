"""What classify says, seen in networks: features that change with width or don't, forms that are equal."""

from __future__ import annotations

import pytest
import torch
from abc_networks import Written, batch, slope, train

from optx.scaling import ABC, abc

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny networks
WIDTHS = (64, 128, 256, 512, 1024)


def change(exponents, width, steps=1, lr=0.3, seed=0):
    """Relative rms change of each hidden layer's features, and the output's own change."""
    x, y = batch()
    model = Written(exponents, width, seed=seed)
    with torch.no_grad():
        before = model.features(x)
    train(model, lr, steps, x, y)
    with torch.no_grad():
        after = model.features(x)
    rms = [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
    scale = [float(a.square().mean().sqrt()) for a in before]
    return [r / s for r, s in zip(rms[:-1], scale[:-1], strict=True)], rms[-1]


def slopes(exponents, widths=WIDTHS, seeds=4, **options):
    """Of the geometric means over seeds: one a hidden layer, and the output's."""
    rows = []
    for width in widths:
        runs = [change(exponents, width, seed=seed, **options) for seed in range(seeds)]
        features = torch.tensor([run[0] for run in runs]).log().mean(0).exp()
        output = torch.tensor([run[1] for run in runs]).log().mean().exp()
        rows.append([*features.tolist(), float(output)])
    return [slope(widths, column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("hidden", [1, 2])
def test_features_change_by_width_to_the_minus_a_half_as_a_kernel(optimizer, hidden):
    *features, output = slopes(ABC.named("ntk", hidden, optimizer), lr=0.3 if optimizer == "sgd" else 0.1)
    assert features == pytest.approx([-0.5] * hidden, abs=0.1)
    assert output == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mup", "mean_field"])
@pytest.mark.parametrize("hidden", [1, 2])
def test_features_change_at_every_width_with_the_maximal_update(optimizer, name, hidden):
    *features, output = slopes(
        ABC.named(name, hidden, optimizer), lr=1.0 if optimizer == "sgd" else 0.1, steps=2
    )
    assert features == pytest.approx([0] * hidden, abs=0.1)
    assert output == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize(("hidden", "power"), [(1, -0.5), (2, 0.5)])
def test_the_standard_point_blows_up_by_the_exponents_in_its_reasons(hidden, power):
    """The output by width^1. In a first step features see the readout's start, half a power below r."""
    exponents = ABC.named("standard", hidden)
    assert "the readout's steps change the output by width^1" in exponents.classify().reasons
    *features, output = slopes(exponents, lr=1e-5)
    assert output == pytest.approx(1, abs=0.15)
    assert features[-1] == pytest.approx(power, abs=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["standard", "ntk", "mup", "mean_field"])
@pytest.mark.parametrize("theta", ["1/2", -0.3])
def test_a_shifted_network_is_the_same_function_all_along(optimizer, name, theta):
    x, y = batch(dtype=torch.float64)
    one = ABC.named(name, 2, optimizer)
    models = [Written(form, 16, dtype=torch.float64, seed=3) for form in (one, one.shift(theta))]
    for model in models:
        train(model, 0.02, 5, x, y)
    with torch.no_grad():
        assert torch.allclose(models[0](x), models[1](x), rtol=1e-9, atol=1e-12)


def test_the_shift_of_sgd_is_not_adams():
    x, y = batch(dtype=torch.float64)
    one = ABC.named("mup", 2, "adam")
    as_sgd = ABC(one.a, one.b, one.c, "sgd").shift("1/2")
    wrong = abc(as_sgd.a, as_sgd.b, as_sgd.c, optimizer="adam")
    models = [Written(form, 16, dtype=torch.float64, seed=3) for form in (one, wrong)]
    for model in models:
        train(model, 0.02, 5, x, y)
    with torch.no_grad():
        assert not torch.allclose(models[0](x), models[1](x), rtol=1e-2)


def test_a_trivial_one_does_not_move():
    mup = ABC.named("mup", 1)
    slow = abc(mup.a, mup.b, "1/2")
    assert slow.classify().regime == "trivial"
    *_, output = slopes(slow, lr=1.0)
    assert output == pytest.approx(-0.5, abs=0.1)
