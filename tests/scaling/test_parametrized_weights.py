"""Weights that a parametrization computes (weight_norm, pruning): width, singular values, coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

import optx

Wrap = Callable[[nn.Module], nn.Module]


def _old(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many published models
        return old_weight_norm(module)


def _pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", amount=0.5)


WRAPS: dict[str, tuple[Wrap, str]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old weight_norm": (_old, "weight_v"),
    "pruned": (_pruned, "weight_orig"),
}


def net(wrap: Wrap, width: int) -> nn.Module:
    return nn.Sequential(
        *(wrap(nn.Linear(8, width)), nn.ReLU(), wrap(nn.Linear(width, 2 * width)), nn.ReLU()),
        wrap(nn.Linear(2 * width, 3)),
    )


@pytest.mark.parametrize("name", WRAPS)
def test_an_original_is_of_the_kind_of_what_it_makes(name: str) -> None:
    wrap, leaf = WRAPS[name]
    shapes = optx.scaling.shapes(net(wrap, 64), base=net(wrap, 16))
    kinds = [(shapes[f"{i}.{leaf}"].kind, shapes[f"{i}.{leaf}"].m) for i in (0, 2, 4)]
    assert kinds == [("input", 4.0), ("matrix", 4.0), ("output", 4.0)]
    again = optx.scaling.shapes(net(wrap, 128), base=shapes)
    assert (again[f"4.{leaf}"].kind, again[f"4.{leaf}"].fan_in) == ("output", 8.0)


def test_a_transposed_original_and_a_module_that_is_one_itself() -> None:
    def conv(width: int) -> nn.Module:
        return parametrizations.weight_norm(nn.ConvTranspose1d(width, 3, 2))

    shapes = optx.scaling.shapes(conv(12), base=conv(4))
    assert shapes["parametrizations.weight.original1"].kind == "output"  # stored as (in, out)
    assert optx.scaling.shapes(conv(24), base=shapes)["parametrizations.weight.original1"].fan_in == 6.0


@pytest.mark.parametrize("name", WRAPS)
def test_an_original_has_no_gain_of_its_own(name: str) -> None:
    wrap, leaf = WRAPS[name]
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    gains = optx.scaling.sublayer_gain(model)
    assert list(gains.top) == ["1.weight"]
    assert gains.left_out[f"0.{leaf}"] == "what a parametrization computes the weight from"


def test_the_coordinate_check_reads_the_layer_and_not_what_makes_its_weight() -> None:
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(16, 8, generator=g), torch.randn(16, 3, generator=g))
    options = {"optimizer": "adam", "seeds": 2, "steps": 2}

    def make(width: int) -> nn.Module:
        return net(parametrizations.spectral_norm, width)

    check = optx.scaling.coordinate_check(make, [32, 64, 128], batch, **options)
    assert list(check.layers) == ["0", "1", "2", "3", "4", ""]
    assert all(check.layers[i].has_weights for i in "024")
    assert all((check.layers[i].update[:, :, 1:] > 0).all() for i in "024")
