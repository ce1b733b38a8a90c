"""feature_change tells kernels from features, on networks written by exponents and on torch's own modules."""

from __future__ import annotations

import pytest
import torch
from abc_networks import Written, batch
from torch import nn

from optx._errors import OptxError
from optx.scaling import ABC, feature_change

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny networks
WIDTHS = (64, 256, 1024)


class Layer(nn.Module):
    """A layer of weights that hooks see."""

    def __init__(self, w, factor):
        super().__init__()
        self.w, self.factor = w, factor

    def forward(self, x):
        return x @ (self.w * self.factor).T


def maker(exponents, lr):
    def make(width):
        written = Written(exponents, width, seed=int(torch.initial_seed()))
        layers = [Layer(w, width ** -float(a)) for w, a in zip(written.w, exponents.a, strict=True)]
        modules = [module for layer in layers for module in (nn.Tanh(), layer)][1:]
        return nn.Sequential(*modules), written.optimizer(lr)

    return make


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("name", "slope"), [("ntk", -0.5), ("mup", 0.0), ("mean_field", 0.0)])
def test_slopes_of_the_named_parametrizations(name, slope, optimizer):
    lr = 0.5 if optimizer == "sgd" else 0.1
    found = feature_change(maker(ABC.named(name, 2, optimizer), lr), WIDTHS, batch(), steps=2)
    assert list(found.slopes) == ["0", "2"]
    assert list(found.slopes.values()) == pytest.approx([slope, slope], abs=0.1)
    assert found.regime == ABC.named(name, 2, optimizer).classify().regime
    assert all(len(row) == len(WIDTHS) and min(row) > 0 for row in found.changes.values())
    assert str(found).splitlines()[2].startswith("2 ")
    assert f"{found.slopes['0']:.2f}" in str(found)


def plain(width):
    layers = [nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 1)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def test_one_rate_of_adam_for_all_widths_is_unstable():
    found = feature_change(plain, WIDTHS, batch(), optimizer="adam", lr=1e-3)
    assert found.regime_of("2") == "unstable"
    assert found.regime == "unstable"
    assert "4" not in found.slopes  # the output is no hidden feature


def test_the_change_is_what_it_says():
    x, y = batch()
    found = feature_change(plain, [16, 32], (x, y), optimizer="sgd", lr=0.1, seeds=1)
    torch.manual_seed(0)
    model = plain(16)
    before = model[0](x).detach()
    (model(x) - y).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model[0](x).detach()
    expected = (after - before).norm() / before.norm()
    assert found.changes["0"][0] == pytest.approx(float(expected), rel=1e-4)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(OptxError, match="no module with weights has an output that grows"):
        feature_change(lambda width: nn.Linear(6, 1), WIDTHS, batch(), optimizer="sgd")
    frozen = lambda width: nn.Sequential(nn.Linear(6, width).requires_grad_(False), nn.Linear(width, 1))  # noqa: E731
    with pytest.raises(OptxError, match="features of '0' don't change or are not finite at width 64"):
        feature_change(frozen, WIDTHS, batch(), optimizer="sgd")
    found = feature_change(plain, [16, 32], batch(), optimizer="sgd", lr=0.1, seeds=1)
    with pytest.raises(OptxError, match="no hidden module is called '4'"):
        found.regime_of("4")
