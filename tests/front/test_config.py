"""`from_config` and `to_config`: every transform and injection there and back, and what is refused."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import optx
from optx._config import _Maker
from optx._config_values import accepted
from optx._expression import defaults


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def net(width: int) -> nn.Module:
    return nn.Transformer(width, 2, 1, 1, 16, batch_first=True)


MODEL = net(8)
SHAPES = optx.scaling.shapes(net(8), base=net(4))
HPARAMS = optx.HParams(drop=optx.hp(0.05, (0, 0.9)), cut=optx.hp(4, (0, None), discrete=True, sigma=0.25))
NAMES = {**vars(optx), "torch": torch, "model": MODEL, "shapes": SHAPES}
METHODS = {
    name: one
    for name, one in vars(optx).items()
    if inspect.isclass(one)
    and issubclass(one, optx.Transform | optx.Injection)
    and not inspect.isabstract(one)
    if one is not optx.Transform
}
# Arguments that are words or objects, and what they may be.
WORDS: dict[str, list[Any]] = {
    "anchor": ["zero", "base.safetensors", "init", ["a.pt", "b.pt"]],
    "blocks": [r"(encoder|decoder)\.layers\.\d+"],
    "decay": ["linear", "none"],
    "domains": [2, ["a", "b"], [3, "c"]],
    "dropout": ["drop", {"drop": r"0\.drop"}, {"drop": nn.Dropout}],
    "eps": ["keep"],
    "feedforward": ["down_proj", ("a", "b")],
    "head": ["lm_head"],
    "hparams": [HPARAMS],
    "init": ["pissa", "olora"],
    "kernel_rank": [(2, 2)],
    "method": ["Mine"],
    "model": [MODEL],
    "optimizer": ["adamw"],
    "parametrization": ["standard", "ntk"],
    "pattern": ["2:4"],
    "rank_pattern": [{"a.*": 4}],
    "alpha_pattern": [{"a.*": 4.0}],
    "shape": [(1, 3, 8, 8)],
    "shapes": [SHAPES],
    "share_policy": ["block"],
}
REQUIRED = {"domains": 2, "hparams": HPARAMS, "model": MODEL, "shapes": SHAPES}
# What an argument only goes together with.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("AdamR", "save_anchor"): {"anchor": "zero"},
    ("DSPReg", "measure"): {"accumulate": True},
    ("HiddenDelta", "form"): {"form": "gelu"},
    ("HiddenDelta", "modifies"): {"modifies": "both"},
    ("HiddenDelta", "compose"): {"compose": "scaled"},
    ("HiddenDelta", "scale"): {"compose": "scaled"},
    **{("HiddenDelta", one): {"modifies": "heads"} for one in ("kv_heads", "head_dim")},
    ("HiddenDelta", "mlp"): {"modifies": "heads", "form": "softmax", "compose": "gated"},
    ("Perp", "dropout"): {"adapter": "lora"},
    ("SaRA", "threshold"): {"fraction": None},
    ("STN", "dropout"): {"dropout": "drop"},
}
# What holds tensors or functions: it can't be written.
UNWRITABLE = {("KeepMask", "masks"), ("Perp", "masks"), ("WindowPrune", "blocks")}


def usual(name: str) -> dict[str, Any]:
    """What a method can't do without."""
    found = {
        k: REQUIRED[k] for k in inspect.signature(METHODS[name]).parameters if k in REQUIRED and k != "model"
    }
    return found | ({"fraction": 0.5} if name == "SaRA" else {}) | ({"model": MODEL} if name == "HFT" else {})


def choices(name: str, argument: str) -> list[Any]:
    """Values that an argument may have, some of them."""
    kinds = accepted(METHODS[name])[argument]
    found = list(WORDS.get(argument, [])) if str in kinds or not {int, float} & set(kinds) else []
    for kind in kinds:
        found += typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else []
        found += [True, False] if kind is bool else []
        found += [1, 3, 2] if kind is int else []
        found += [0.25, 1e-4, 3.0] if kind is float else []
    return found + (WORDS[argument] if argument in ("kernel_rank", "domains", "shape", "feedforward") else [])


def made(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return METHODS[name](**arguments)
    except optx.OptxError:  # these don't go together
        return None


def check_there_and_back(thing: Any) -> None:
    entry = optx.to_config(thing)
    read = json.loads(json.dumps(entry))
    kind = optx.Transform if isinstance(thing, optx.Transform) else optx.Injection
    again = _Maker(MODEL).made(read, "here", kind)
    assert repr(again) == repr(thing)
    assert optx.to_config(again) == entry
    typed = eval(repr(thing), dict(NAMES))
    assert type(typed) is type(thing)
    assert optx.to_config(typed) == entry
    for name, value in thing.arguments().items():
        for other in (again, typed):
            found = other.arguments()[name]
            assert type(found) is type(value)
            assert found == value or isinstance(value, optx.HParams)


@pytest.mark.parametrize("name", METHODS)
def test_each_argument_goes_there_and_back(name: str) -> None:
    """So that a new one, of a kind that a config can't hold, is noticed."""
    check_there_and_back(METHODS[name](**usual(name)))
    for argument in inspect.signature(METHODS[name]).parameters:
        if (name, argument) in UNWRITABLE:
            continue
        beside, plain = BESIDE.get((name, argument), {}), defaults(METHODS[name])
        values = [beside[argument]] if argument in beside else choices(name, argument)
        things = [
            thing
            for value in values
            if argument not in plain or plain[argument] != value or isinstance(value, bool)
            if (thing := made(name, {**usual(name), **beside, argument: value})) is not None
        ]
        assert things, f"{name} takes nothing that this test gives it for {argument}"
        for thing in things:
            check_there_and_back(thing)


@st.composite
def anything(draw: st.DrawFn) -> Any:
    """A method with up to four arguments of its signature."""
    name = draw(st.sampled_from(sorted(METHODS)))
    open_to = [one for one in inspect.signature(METHODS[name]).parameters if (name, one) not in UNWRITABLE]
    chosen = draw(st.lists(st.sampled_from(open_to), max_size=4, unique=True)) if open_to else []
    numbers = st.floats(0, 1, exclude_min=True).map(float)
    values: dict[str, Any] = {}
    for one in chosen:
        free = float in accepted(METHODS[name])[one] and draw(st.booleans())
        values[one] = draw(numbers if free else st.sampled_from(choices(name, one)))
    return made(name, {**usual(name), **values})


@settings(max_examples=60, deadline=None)
@given(anything())
def test_methods_go_there_and_back(thing: Any) -> None:
    if thing is not None:
        check_there_and_back(thing)


def test_every_loss_is_made_by_its_name() -> None:
    loss = optx.from_config({"loss": {"name": "StableMaxCrossEntropy", "label_smoothing": "1e-1"}}).loss
    assert loss.label_smoothing == 0.1
    assert optx.from_config({"loss": {"name": "SAF", "num_samples": 8, "dtype": "bfloat16"}}).loss is not None
    assert optx.from_config({"loss": "MESA"}, model=small()).loss is not None
    assert optx.from_config({"loss": {"name": "LossReweight", "r": "0.5"}}).loss.r == 0.5
