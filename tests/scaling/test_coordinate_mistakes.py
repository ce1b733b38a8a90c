"""What breaks under the coordinate check is named, and what cannot be checked is refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from mup_by_hand import batch, bent, mlp
from torch import nn

import optx
from optx.scaling import coordinate_check

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny tensors


def test_inf_and_zero_at_some_width_are_faults_of_the_layer_where_they_begin():
    def make(width: int, what: float) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 3))
        if width == 64:
            model[1].weight.data.fill_(what)
            model[1].bias.data.fill_(what)
        return model

    broken = coordinate_check(lambda w: make(w, math.inf), [16, 32, 64], batch(), optimizer="sgd")
    assert list(broken.failures) == ["1"]
    assert "inf or nan at width 64" in broken.failures["1"]
    dead = coordinate_check(lambda w: make(w, 0.0), [16, 32, 64], batch(), optimizer="sgd")
    assert list(dead.failures) == ["1"]
    assert "is 0 at width 64 and is not at others" in dead.failures["1"]


def test_after_a_loss_that_is_not_finite_nothing_more_is_read():
    """Its gradients would make every layer look guilty."""

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 3))
        head = {"params": model[1].parameters(), "lr": math.inf}
        return model, torch.optim.SGD([{"params": model[0].parameters()}, head], lr=0.0)

    check = coordinate_check(make, [16, 32, 64], batch(), seeds=1)
    assert list(check.failures) == ["1"]
    assert not check.later


def test_a_run_that_diverges_is_told_without_warnings():
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = coordinate_check(make, [16, 32, 64], batch(), optimizer="sgd", lr=1e30, steps=5)
    assert not check.ok
    assert "FAILS" in str(check)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": [8]}, "two different ones"),
        ({"widths": 8}, "widths is 8"),
        ({"optimizer": torch.optim.SGD}, "must be a function of a model: lambda model"),
        ({"optimizer": lambda model: None}, "gave a NoneType"),
        ({"widths": [8, 8]}, "each once"),
        ({"widths": [0, 8]}, "a width is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seeds": 1.5}, "seeds is 1.5"),
        ({"norm": "max"}, "norm is 'max'"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"optimizer": "adamx"}, "optimizer is 'adamx'.*'adamw'"),
        ({"optimizer": None}, "gave a model alone"),
        ({"batches": []}, "batches is empty"),
        ({"batches": torch.ones(2)}, "a batch is a Tensor"),
        ({"batches": {"input": torch.ones(2, 8)}}, "no loss to train with.*'NoneType'"),
        ({"loss_fn": lambda y, _: y}, r"no loss to train with \(it is of shape \(32, 3\)\)"),
        ({"batches": (torch.ones(2, 8), torch.ones(2, 1))}, r"shape \(2, 3\) and the target \(2, 1\)"),
        (
            {"make": lambda w: nn.Linear(8, 3 + w // (16 - w))},
            r"make\(16\) raised ZeroDivisionError.*Choose widths",
        ),
        (
            {"make": lambda w: nn.Sequential(nn.Linear(8, 3), *(nn.ReLU() for _ in range(w)))},
            "'1?[0-9]' is in one of them only.*depth",
        ),
        ({"make": lambda w: "model"}, "gave str"),
        ({"make": lambda w: (nn.Linear(8, 3), 1)}, "gave tuple"),
        ({"make": lambda w: mlp(w)[0].requires_grad_(False)}, "no parameter that requires a gradient"),
    ],
)
def test_what_cannot_be_is_said(change, words):
    options = {
        "make": lambda w: mlp(w)[0],
        "widths": [8, 16],
        "batches": batch(),
        "optimizer": "sgd",
    } | change
    with pytest.raises(optx.OptxError, match=words):
        coordinate_check(**options)


def test_one_model_given_twice_and_two_optimizers_are_refused():
    model = mlp(64)[0]
    with pytest.raises(optx.OptxError, match=r"make\(16\) gave a model that it had given before"):
        coordinate_check(lambda w: model, [8, 16], batch(), optimizer="sgd")
    with pytest.raises(optx.OptxError, match="optimizer='sgd' is given too"):
        coordinate_check(bent("", "adam", False), [64, 128], batch(), optimizer="sgd")
