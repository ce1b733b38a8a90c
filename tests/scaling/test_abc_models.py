"""abc-parametrisations on models as torch makes them, through init_, mup and MuReadout."""

from __future__ import annotations

import pytest
import torch
from abc_networks import batch
from torch import nn

import optx
from optx._errors import OptxError
from optx.scaling import ABC, abc, feature_change, init_, mup, shapes

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny models
BASE = 16


def make(width, bias=True):
    layers = [nn.Linear(6, width, bias), nn.Linear(width, width, bias), nn.Linear(width, 1, bias)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def widths_of(model):
    return shapes(model, base=make(BASE), delta=make(2 * BASE))


def optimizer_of(model, widths, family, parametrization, lr):
    kind = torch.optim.SGD if family == "sgd" else torch.optim.Adam
    options = {} if family == "sgd" else {"eps": 1e-30}
    base = kind(model.named_parameters(), lr=lr, **options)
    return mup(base, widths, parametrization=parametrization, decay="none", eps="keep")


@pytest.mark.parametrize("family", ["sgd", "adam"])
@pytest.mark.parametrize("form", ["ntk", "mean_field", "own"])
def test_multipliers_need_no_optimizer(form, family):
    x, _ = batch()
    model = make(4 * BASE)
    one = (
        ABC.named(form, optimizer=family)
        if form != "own"
        else abc([0.5, "1/3", 1], [0] * 3, 0, optimizer=family)
    )
    expected = x
    for layer, number in enumerate((0, 2, 4)):
        weight = model[number].weight * 4 ** -float(one.a[layer])
        expected = (torch.tanh(expected) if layer else expected) @ weight.T + model[number].bias
    with optx.attach(model, optx.MuReadout(widths_of(model), parametrization=one)):
        assert torch.allclose(model(x), expected, atol=1e-6)
    if form != "own":
        with optx.attach(model, optx.MuReadout(widths_of(model), parametrization=form)):
            assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*has the size that the model was made with:UserWarning")
@pytest.mark.parametrize("family", ["sgd", "adam"])
@pytest.mark.parametrize(
    "exponents",
    [
        ABC.named("ntk"),
        ABC.named("mup"),
        ABC.named("mean_field"),
        abc([0.25, "1/3", 0.5], [0, 0.1, 0.2], [0, 0.5, 1]),
    ],
    ids=lambda one: one.name,
)
def test_a_model_is_trained_as_its_exponents_are_written(family, exponents):
    """Weights times (width / base)^-a, at a rate times (width / base)^-c; biases as of their page."""
    if exponents.name == "abc":
        one = abc(exponents.a, exponents.b, exponents.c, optimizer=family)
    else:
        one = ABC.named(exponents.name, optimizer=family)
    torch.manual_seed(0)
    x, y = batch()
    model = make(4 * BASE).double()
    x, y, m = x.double(), y.double(), 4.0
    widths = widths_of(model)
    written = [p.detach().clone().requires_grad_() for p in model.parameters()]
    handle = optx.attach(model, optx.MuReadout(widths, parametrization=one))
    optimizer = optimizer_of(model, widths, family, one, 0.01)

    def forward(x):
        for layer in range(3):
            w, b = written[2 * layer], written[2 * layer + 1]
            x = (torch.tanh(x) if layer else x) @ (w * m ** -float(one.a[layer])).T + b
        return x

    shift = 2 if family == "sgd" else 1
    of_bias = m ** -float(one.c[0] + shift * one.a[0])
    rates = [
        rate for layer in range(3) for rate in (m ** -float(one.c[layer]), of_bias if layer < 2 else 1.0)
    ]
    kind = torch.optim.SGD if family == "sgd" else torch.optim.Adam
    other = kind([{"params": [p], "lr": 0.01 * r} for p, r in zip(written, rates, strict=True)])
    for group in other.param_groups:
        if family == "adam":
            group["eps"] = 1e-30
    for _ in range(4):
        for f, o in ((model, optimizer), (forward, other)):
            o.zero_grad()
            (f(x) - y).square().mean().backward()
            o.step()
        assert torch.allclose(model(x), forward(x), rtol=1e-9, atol=1e-11)
    handle.remove()


@pytest.mark.parametrize("name", ["ntk", "mean_field", "mup"])
def test_first_weights_shrink_by_their_exponent(name):
    torch.manual_seed(0)
    one, model = ABC.named(name), make(16 * BASE)
    init_(model, widths_of(model), parametrization=one)
    base = make(BASE)
    for layer, number in enumerate((0, 2, 4)):
        fresh = float(base[number].in_features ** -0.5 / 3**0.5)
        assert float(model[number].weight.detach().std()) == pytest.approx(
            fresh * 16 ** -float(one.b[layer]), rel=0.1
        )


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("family", ["sgd", "adam"])
@pytest.mark.parametrize(("name", "slope"), [("ntk", -0.5), ("mup", 0.0), ("mean_field", 0.0)])
def test_features_of_plain_models_follow_the_name(name, slope, family):
    def fitted(width):
        model = make(width)
        widths = widths_of(model)
        init_(model, widths, parametrization=name)
        optx.attach(model, optx.MuReadout(widths, parametrization=name))
        return model, optimizer_of(model, widths, family, name, 0.3 if family == "sgd" else 0.05)

    found = feature_change(fitted, [64, 256, 1024], batch(), steps=2)
    assert list(found.slopes.values()) == pytest.approx([slope, slope], abs=0.12)


def test_the_other_familys_exponents_are_refused_by_mup_alone():
    model = make(4 * BASE)
    widths = widths_of(model)
    one = ABC.named("ntk", optimizer="sgd")
    init_(model, widths, parametrization=one)
    optx.attach(model, optx.MuReadout(widths, parametrization=one))
    with pytest.raises(OptxError, match="these exponents are for sgd"):
        optimizer_of(model, widths, "adam", one, 0.1)


@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_a_factor_that_nothing_applies_is_told_for_either_family(family):
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    base = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    kind = torch.optim.SGD if family == "sgd" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=0.1)
    one = ABC.named("mup", hidden=2, optimizer=family)
    mup(optimizer, optx.scaling.shapes(model, base=base), parametrization=one, model=model)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"'0.weight' is of kind 'input'.* multiplied by 2, which no"):
        optimizer.step()
