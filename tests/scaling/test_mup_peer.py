"""`optx.scaling.mup` and `init_` against the authors' package mup: its numbers, and live where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mup_models import BASE, DECAY, LR, MODELS, TARGETS, batch
from torch import nn

import optx

# What these train multiplies no output: the rules of its groups are looked at, not what it learns.
pytestmark = pytest.mark.filterwarnings("ignore:.*no optx.MuReadout does:UserWarning")
TABLES = json.loads(Path(__file__).with_name("mup_tables.json").read_text())["tables"]
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
every_table = pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t['model']}-{t['width']}")


def shapes_of(name: str, model: nn.Module) -> Any:
    make = MODELS[name]
    return optx.scaling.shapes(model, base=make(BASE), delta=make(2 * BASE))


def test_all_was_recorded() -> None:
    assert {(t["model"], t["width"]) for t in TABLES} == {
        (name, width) for name in MODELS for width in TARGETS
    }


@every_table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rates_and_decays_are_the_peers(table: dict[str, Any], optimizer: str) -> None:
    model = MODELS[table["model"]](table["width"])
    opt = OPTIMIZERS[optimizer](model.named_parameters(), lr=LR, weight_decay=DECAY)
    optx.scaling.mup(opt, shapes_of(table["model"], model), decay="linear", eps="keep")
    found = {n: [g["lr"], g["weight_decay"]] for g in opt.param_groups for n in g["param_names"]}
    assert found == table[optimizer]  # to the last bit


@every_table
def test_groups_of_a_model_are_the_peers(table: dict[str, Any]) -> None:
    model = MODELS[table["model"]](table["width"])
    shapes = shapes_of(table["model"], model)
    groups = optx.scaling.mup(
        model, shapes, lr=LR, weight_decay=DECAY, optimizer="adamw", decay="linear", eps=1e-6
    )
    found = {n: [g["lr"], g["weight_decay"]] for g in groups for n in g["param_names"]}
    assert found == table["adamw"]
    opt = torch.optim.AdamW(groups)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert optx.scaling.mup(opt, shapes, decay="linear") is opt  # taken over, and not multiplied again
    assert {n: [g["lr"], g["weight_decay"]] for g in opt.param_groups for n in g["param_names"]} == found
    with pytest.raises(optx.OptxError, match="on this AdamW already"):
        optx.scaling.mup(opt, shapes, decay="linear")


@every_table
def test_first_weights_are_the_peers(table: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = MODELS[table["model"]](table["width"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optx.scaling.init_(model, shapes_of(table["model"], model))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * table["init"][name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_step_updates_are_as_large_as_the_tables_say(name: str, optimizer: str) -> None:
    """Adam's first step is lr * sign(gradient), SGD's lr * gradient: in float64, to 1e-12."""
    table = next(t for t in TABLES if t["model"] == name and t["width"] == 48)
    torch.manual_seed(0)
    model = MODELS[name](48).double()
    make = OPTIMIZERS[optimizer]
    opt = make(
        model.named_parameters(), lr=LR, **({} if optimizer == "sgd" else {"eps": 0.0}), weight_decay=0.0
    )
    optx.scaling.mup(opt, shapes_of(name, model), decay="linear")
    x = batch(name)
    model(x.double() if x.is_floating_point() else x).square().sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.step()
    for n, p in model.named_parameters():
        assert p.grad is not None
        step = (before[n] - p.detach())[p.grad != 0]
        expected = (p.grad if optimizer == "sgd" else p.grad.sign())[p.grad != 0] * table[optimizer][n][0]
        # Of a difference of weights, as many digits as the weights have.
        torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-15)


# ---- live --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_peers_to_the_last_bit(name: str, optimizer: str) -> None:
    mup = pytest.importorskip("mup")
    make = MODELS[name]

    def train(ours: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = make(64, mup.MuReadout)
        # The forward multiplier comes of the peer's own layer on both sides.
        mup.set_base_shapes(
            model, make(BASE, mup.MuReadout), delta=make(32, mup.MuReadout), rescale_params=not ours
        )
        if ours:
            optx.scaling.init_(model, shapes_of(name, model))
            opt = OPTIMIZERS[optimizer](model.named_parameters(), lr=LR, weight_decay=DECAY)
            optx.scaling.mup(opt, shapes_of(name, model), decay="linear", eps="keep")
        else:
            peer = {"sgd": mup.MuSGD, "adam": mup.MuAdam, "adamw": mup.MuAdamW}[optimizer]
            opt = peer(model.parameters(), lr=LR, weight_decay=DECAY)
        for _ in range(3):
            opt.zero_grad()
            model(batch(name)).square().mean().backward()
            opt.step()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, train(True), train(False)))


def test_the_record_is_what_the_package_says() -> None:
    mup = pytest.importorskip("mup")
    model = MODELS["mlp"](48, mup.MuReadout)
    mup.set_base_shapes(model, MODELS["mlp"](BASE, mup.MuReadout), delta=MODELS["mlp"](32, mup.MuReadout))
    opt = mup.MuAdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    groups = {id(p): [g["lr"], g["weight_decay"]] for g in opt.param_groups for p in g["params"]}
    table = next(t for t in TABLES if t["model"] == "mlp" and t["width"] == 48)
    assert {n: groups[id(p)] for n, p in model.named_parameters()} == table["adamw"]
    assert table["init"]["head.weight"] == pytest.approx(math.sqrt(3), rel=1e-6)
