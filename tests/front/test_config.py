"""`from_config` and `to_config`: every transform and injection there and back, and what is refused."""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import optx
from optx._config import _Maker
from optx._config_names import known
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
    "init": ["pissa", "olora", "fit"],
    "activation": ["relu", (0.25, 1.0)],
    "ffn": ["mlp"],
    "keep": [("attn", "mlp")],
    "kernel_rank": [(2, 2)],
    "method": ["Mine"],
    "model": [MODEL],
    "noise_clamp": [(-1.5, 3.0)],
    "optimizer": ["adamw"],
    "parametrization": ["standard", "ntk"],
    "pattern": ["2:4"],
    "rank_pattern": [{"a.*": 4}],
    "alpha_pattern": [{"a.*": 4.0}],
    "shape": [(1, 3, 8, 8)],
    "share": [("attn",)],
    "shapes": [SHAPES],
    "share_policy": ["block"],
}
REQUIRED = {"domains": 2, "hparams": HPARAMS, "kappa": 0.5, "model": MODEL, "shapes": SHAPES}
# What an argument only goes together with.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("AdamR", "save_anchor"): {"anchor": "zero"},
    ("BackSlash", "total_steps"): {"until": 0.5, "total_steps": 8},
    ("DSPReg", "measure"): {"accumulate": True},
    ("HiddenDelta", "form"): {"form": "gelu"},
    ("HiddenDelta", "modifies"): {"modifies": "both"},
    ("HiddenDelta", "compose"): {"compose": "scaled"},
    ("HiddenDelta", "scale"): {"compose": "scaled"},
    **{("HiddenDelta", one): {"modifies": "heads"} for one in ("kv_heads", "head_dim")},
    ("HiddenDelta", "mlp"): {"modifies": "heads", "form": "softmax", "compose": "gated"},
    ("Perp", "dropout"): {"adapter": "lora"},
    ("SphericalHead", "loss"): {"loss": optx.ZLoss(b=3.0)},
    ("SaRA", "threshold"): {"fraction": None},
    ("SoftThinking", "cold_stop"): {"end_id": 3},
    ("STN", "dropout"): {"dropout": "drop"},
}
# What holds tensors or functions: it can't be written.
UNWRITABLE = {("KeepMask", "masks"), ("Perp", "masks"), ("SubGM", "loss"), ("WindowPrune", "blocks")} | {
    ("VQLogits", "counts")
}


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
            assert found == value or isinstance(value, optx.HParams | nn.Module)


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
    every = [one for one in inspect.signature(METHODS[name]).parameters if (name, one) not in UNWRITABLE]
    numeric = {one for one, kinds in accepted(METHODS[name]).items() if float in kinds}
    open_to = [one for one in every if one in numeric or choices(name, one)]
    chosen = draw(st.lists(st.sampled_from(open_to), max_size=4, unique=True)) if open_to else []
    numbers = st.floats(0, 1, exclude_min=True).map(float)
    values: dict[str, Any] = {}
    for one in chosen:
        told = choices(name, one)
        free = not told or (one in numeric and draw(st.booleans()))
        values[one] = draw(numbers if free else st.sampled_from(told))
    return made(name, {**usual(name), **values})


@settings(max_examples=60, deadline=None)
@given(anything())
def test_methods_go_there_and_back(thing: Any) -> None:
    if thing is not None:
        check_there_and_back(thing)


def test_every_public_class_has_its_name() -> None:
    """And nothing else has."""
    losses = {one for one in vars(optx).values() if getattr(one, "__module__", "").startswith("optx.signal.")}
    assert {*known(optx.Transform).items(), *known(optx.Injection).items()} == set(METHODS.items())
    losses -= {optx.RobustRecoveryLoss}  # it is made of measurements, which no config has
    assert set(known(nn.Module).values()) == {one for one in losses if inspect.isclass(one)}


def test_every_loss_is_made_by_its_name() -> None:
    loss = optx.from_config({"loss": {"name": "StableMaxCrossEntropy", "label_smoothing": "1e-1"}}).loss
    assert loss.label_smoothing == 0.1
    assert optx.from_config({"loss": {"name": "SAF", "num_samples": 8, "dtype": "bfloat16"}}).loss is not None
    assert optx.from_config({"loss": "MESA"}, model=small()).loss is not None
    assert optx.from_config({"loss": {"name": "LossReweight", "r": "0.5"}}).loss.r == 0.5


# ---- what is made ---------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "lr": "1e-3", "betas": [0.9, "9.5e-1"], "weight_decay": 0},
    "transforms": ["PerpGrad", {"name": "AdamR", "weight": "5e-2"}],
    "wrap": {"skip_nonfinite": True, "fused": False, "metrics": True},
    "attach": [{"name": "LoRA", "rank": 2, "targets": "torch.nn.Linear", "exclude": ["2"]}],
    "trainable_only": True,
}


def test_a_config_is_what_the_calls_are() -> None:
    """Trained for three steps beside the same by hand."""
    x = torch.randn(4, 8)
    by_config, by_hand = small(), small()
    torch.manual_seed(1)
    optimizer, handles, loss = optx.from_config(FULL, model=by_config)
    torch.manual_seed(1)
    handle = optx.attach(by_hand, optx.LoRA(rank=2), nn.Linear, exclude=["2"])
    optx.trainable_only(by_hand, handle)
    base = torch.optim.AdamW(handle.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    plain = optx.wrap(base, optx.PerpGrad(), optx.AdamR(0.05), skip_nonfinite=True, fused=False)
    for model, opt in ((by_config, optimizer), (by_hand, plain)):
        for _ in range(3):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    assert loss is None
    assert (optimizer.skip_nonfinite, optimizer.fused) == (True, False)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert all(p.any() for p in handles[0].parameters())
    for key, tensor in by_hand.state_dict().items():
        assert torch.equal(by_config.state_dict()[key], tensor), key


def test_an_optimizer_and_handles_are_written_down() -> None:
    made = optx.from_config(FULL, model=small())
    config = {**optx.to_config(made.optimizer), "attach": [optx.to_config(h) for h in made.handles]}
    again = optx.from_config(json.loads(json.dumps(config)), model=small())
    assert again.optimizer.defaults == made.optimizer.defaults
    assert again.optimizer.transforms.__repr__() == made.optimizer.transforms.__repr__()
    assert [one.path for one in again.handles[0].served] == [one.path for one in made.handles[0].served]
    assert again.optimizer.skip_nonfinite
    assert again.optimizer.metrics_asked
    assert "skip_nonfinite=True, metrics=True)" in repr(again.optimizer)


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, functools.partial(torch.optim.AdamW, lr=0.5), lambda p: torch.optim.Adam(p, lr=0.5)],
)
def test_a_function_of_parameters_makes_the_optimizer(make: Any) -> None:
    """Lightning's and Hydra's form; it gets what was attached, too."""
    model = small()
    made = optx.from_config({"attach": [{"name": "LoRA", "rank": 1, "targets": "0"}]}, make, model)
    trained = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}


def test_any_mapping_and_sequence_is_read() -> None:
    frozen = MappingProxyType(
        {"transforms": (MappingProxyType({"name": "AdamR", "weight": 0.5, "normalize": False}),)}
    )
    made = optx.from_config(frozen, torch.optim.SGD(small().parameters()))
    assert made.optimizer.adamr.weight == 0.5


def test_files_stand_for_masks_shapes_and_adapters(tmp_path: Path) -> None:
    model = small()
    masks = optx.prune(model, optx.Magnitude(0.5))
    masks.save(tmp_path / "masks.safetensors")
    kept = {"name": "KeepMask", "masks": str(tmp_path / "masks.safetensors")}
    made = optx.from_config({"optimizer": "SGD", "transforms": [kept]}, model=model)
    assert made.optimizer.keep_mask.current() == masks
    wide = optx.scaling.shapes(nn.Linear(8, 4), base=nn.Linear(4, 4))
    wide.save(tmp_path / "shapes.json")
    mu = {"name": "MuAdamW", "shapes": str(tmp_path / "shapes.json"), "model": True}
    made = optx.from_config({"optimizer": "AdamW", "transforms": [mu]}, model=nn.Linear(8, 4))
    assert made.optimizer.transforms[0].shapes == wide
    model = small()
    with optx.attach(model, optx.LoRA(rank=2), "0") as handle:
        handle.save(tmp_path / "adapter")
    made = optx.from_config(
        {"attach": [{"path": str(tmp_path / "adapter"), "adapter_name": "a"}]}, model=model
    )
    assert made.handles[0].served[0].name == "a"


# ---- what is refused ------------------------------------------------------------------------------------

LORA = {"name": "LoRA", "rank": 1, "targets": "0"}
WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([1], "config is a list; it must be a table"),
    "section": ({"transform": []}, "there is no 'transform'. Near: 'transforms'"),
    "injections": ({"injections": []}, "there is no 'injections'; their list is called 'attach'"),
    "the whole file": ({"optx": {}, "lr": 1}, "If it is a section of a larger file, pass config['optx']"),
    "no list": ({"attach": LORA}, "attach is {'name': 'LoRA', 'rank': 1, 'targets': '0'}; it must be a list"),
    "lower case": (
        {"transforms": ["perp_grad"]},
        "transforms[0]: there is no transform 'perp_grad'. Is 'PerpGrad' meant",
    ),
    "other section": ({"transforms": ["LoRA"]}, "transforms[0]: LoRA is no transform; it goes into 'attach'"),
    "no name": (
        {"transforms": [{"weight": 1}]},
        "transforms[0] is {'weight': 1}; it must be a name, or a table",
    ),
    "no module": (
        {"transforms": ["not_there.Own"]},
        "'not_there.Own' can't be imported (No module named 'not_there')",
    ),
    "no method": ({"transforms": ["torch.nn.Linear"]}, "'torch.nn.Linear' is no transform"),
    "argument": (
        {"transforms": [{"name": "AdamR", "wieght": 1}]},
        "(AdamR): there is no 'wieght'. Near: 'weight'",
    ),
    "missing": ({"transforms": ["DSPReg"]}, "transforms[0] (DSPReg): domains is missing"),
    "no number": (
        {"transforms": [{"name": "AdamR", "weight": "strong"}]},
        "weight is the word 'strong'; it must be a number",
    ),
    "a quoted switch": (
        {"attach": [LORA | {"rslora": "false"}]},
        "rslora is the word 'false'; write true or false",
    ),
    "a switch in numbers": ({"attach": [LORA | {"rslora": 1}]}, "rslora is 1; it must be true or false"),
    "no switch": ({"attach": [LORA | {"rank": True}]}, "rank is true, and is not a switch"),
    "null": ({"attach": [LORA | {"rank": None}]}, "rank is null; leave it out for its default"),
    "a list there": ({"attach": [LORA | {"rank": [1]}]}, "rank is a list, [1], and can't be one"),
    "a table there": ({"attach": [LORA | {"rank": {"a": 1}}]}, "rank is a table, {'a': 1}, and can't be one"),
    "hyperparameter": (
        {"attach": [{"name": "STN", "hparams": {"d": {"valu": 1}}}]},
        "hparams['d']: there is no 'valu'",
    ),
    "setting": ({"wrap": {"roundin": "kahan"}}, "wrap: there is no 'roundin'. Near: 'rounding'"),
    "optimizer": ({"optimizer": "Adamw"}, "there is no optimizer of torch.optim 'Adamw'. Is 'AdamW' meant"),
    "its argument": (
        {"optimizer": {"name": "AdamW", "lrr": 1}},
        "optimizer (AdamW): there is no 'lrr'. Near: 'lr'",
    ),
    "all frozen": (
        {"trainable_only": True},
        "trainable_only freezes all but what attach adds, and attach is empty",
    ),
    "loss": ({"loss": "Stablemax"}, "loss: there is no loss 'Stablemax'. Near: 'StableMaxCrossEntropy'"),
    # and what only shows while it is made
    "second of two": ({"attach": [LORA, LORA | {"targets": "9"}]}, "no module matches targets='9'"),
    "rate": ({"attach": [LORA], "optimizer": {"name": "AdamW", "lr": -1}}, "Invalid learning rate"),
    "transform": (
        {"attach": [LORA], "transforms": [{"name": "AdamR", "anchor": "no.pt"}]},
        "There is no file",
    ),
    "loss that fails": ({"attach": [LORA], "loss": {"name": "SAF", "num_samples": 0}}, "num_samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs_change_nothing(case: str) -> None:
    config, said = WRONG[case]
    if isinstance(config, dict) and case != "the whole file":
        config = {
            "optimizer": "AdamW",
            "trainable_only": bool(config.get("attach")) and case != "no list",
            **config,
        }
    model = small()
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(said)):
        optx.from_config(config, model=model)
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_optimizer_from_before_does_not_train_what_is_attached() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(
        optx.OptxError, match=r"made before LoRA\(rank=1\) was attached, and would not train it"
    ):
        optx.from_config({"attach": [LORA]}, optimizer, model)
    assert not any("optx" in name for name, _ in model.named_modules())
    with pytest.raises(optx.OptxError, match="optimizer is given twice"):
        optx.from_config({"optimizer": "SGD"}, optimizer, model)
    with pytest.raises(optx.OptxError, match="transforms and wrap are of an optimizer, and there is none"):
        optx.from_config({"transforms": ["PerpGrad"]})
    with pytest.raises(optx.OptxError, match="attach needs the model; pass model="):
        optx.from_config({"attach": [LORA]})
    with pytest.raises(optx.OptxError, match=r"model is the model; pass it as optx.from_config"):
        optx.from_config({"transforms": ["HFT"]}, optimizer)


def test_what_cant_be_written_says_why() -> None:
    model = small()
    masks = optx.prune(model, optx.Magnitude(0.5))
    cases: list[tuple[Any, str]] = [
        (
            optx.KeepMask(masks),
            "KeepMask has masks, tensors (a Masks), which can't be written; save it and give",
        ),
        (optx.AdamR(anchor=model.state_dict()), "AdamR has anchor, tensors (a OrderedDict), which can't"),
        (optx.AdamR(anchor=model), "AdamR has anchor, a Sequential, which can't be written"),
        (
            optx.WindowPrune(blocks=lambda m: None),
            "WindowPrune has blocks, the function <lambda>, which can't",
        ),
        (nn.Linear(1, 1), "is none of these: a transform, an injection"),
    ]
    for thing, said in cases:
        with pytest.raises(optx.OptxError, match=re.escape(said)):
            optx.to_config(thing)
    assert repr(optx.AdamR(anchor=model)) == "AdamR(weight=0.05, anchor=anchor)"


@pytest.mark.parametrize("key", ["lr", "perp_grad", "perp_grad_rescale"])
def test_groups_that_differ_are_refused(key: str) -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optx.wrap(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), optx.PerpGrad())
    assert optx.to_config(opt)["optimizer"]["lr"] == 0.1
    opt.param_groups[1][key] = 0.5 if key == "lr" else False
    with pytest.raises(optx.OptxError, match=f"a param group with {key}=.* beside {key}="):
        optx.to_config(opt)
