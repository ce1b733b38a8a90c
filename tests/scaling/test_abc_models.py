"""abc-parametrisations on models as torch makes them."""

from __future__ import annotations

import pytest
import torch
from abc_networks import batch
from torch import nn

import optx
from optx.scaling import ABC, abc, shapes

BASE = 16


def make(width, bias=True):
    layers = [nn.Linear(6, width, bias), nn.Linear(width, width, bias), nn.Linear(width, 1, bias)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def widths_of(model):
    return shapes(model, base=make(BASE), delta=make(2 * BASE))


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
