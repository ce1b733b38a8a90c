"""`optx.scaling.mup` on optimizers: how groups are split, what they keep, and what is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mup_models import MLP, Transformer, batch
from torch import nn

import optx
from optx.scaling import Shapes

LR, DECAY = 3e-3, 0.1
# What these train multiplies no output: the rules of its groups are looked at, not what it learns.
pytestmark = pytest.mark.filterwarnings("ignore:.*no optx.MuReadout does:UserWarning")


def model_and_shapes(width: int = 64, base: int = 16) -> tuple[nn.Module, Shapes]:
    torch.manual_seed(0)
    model = MLP(width)
    return model, optx.scaling.shapes(model, base=MLP(base), delta=MLP(2 * base))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), **{"lr": LR, "weight_decay": DECAY, **options})


def train(model: nn.Module, opt: Any, steps: int = 1, schedule: Any = None) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(batch("mlp")).square().mean().backward()
        opt.step()
        if schedule is not None:
            schedule.step()


def numbers(opt: Any) -> dict[str, tuple[float, float]]:
    return {n: (g["lr"], g["weight_decay"]) for g in opt.param_groups for n in g["param_names"]}


# ---- splitting ---------------------------------------------------------------------------------------


def test_one_group_becomes_parts_in_place() -> None:
    model, shapes = model_and_shapes()
    opt = adamw(model, betas=(0.8, 0.9), amsgrad=True)
    listed, first = opt.param_groups, opt.param_groups[0]
    assert optx.scaling.mup(opt, shapes) is opt
    assert opt.param_groups is listed
    assert opt.param_groups[0] is first
    assert numbers(opt) == {
        "first.weight": (LR, 0.0),
        "first.bias": (LR, 0.0),
        "hidden.weight": (LR / 4, 2 * DECAY),
        "hidden.bias": (LR, 0.0),
        "back.weight": (LR / 4, 2 * DECAY),
        "head.weight": (LR, 0.0),
        "head.bias": (LR, 0.0),
    }
    assert [g["param_names"] for g in opt.param_groups] == [
        ["first.weight", "first.bias", "hidden.bias", "head.weight"],
        ["hidden.weight", "back.weight"],
        ["head.bias"],
    ]
    names = dict(model.named_parameters())
    for g in opt.param_groups:
        assert all(names[n] is p for n, p in zip(g["param_names"], g["params"], strict=True))
    assert all(g["betas"] == (0.8, 0.9) and g["amsgrad"] for g in opt.param_groups)
    assert [g["eps"] for g in opt.param_groups] == [1e-8 / 4, 1e-8 / 4, 1e-8]


def test_groups_keep_their_own_learning_rates_as_multiples() -> None:
    model, shapes = model_and_shapes()
    names = dict(model.named_parameters())
    slow = [(n, names.pop(n)) for n in ("hidden.weight", "hidden.bias")]
    opt = torch.optim.AdamW(
        [
            {"params": slow, "lr": LR / 10, "weight_decay": 0.3},
            {"params": list(names.items()), "tag": "rest"},
        ],
        lr=LR,
        weight_decay=DECAY,
    )
    optx.scaling.mup(opt, shapes, decay="none")
    found = numbers(opt)
    assert found["hidden.weight"] == (LR / 40, 0.3)
    assert found["hidden.bias"] == (LR / 10, 0.3)
    assert found["back.weight"] == (LR / 4, DECAY)
    assert found["first.weight"] == (LR, DECAY)
    assert ["tag" in g for g in opt.param_groups] == [False, False, True, True, True]


def test_state_of_an_optimizer_that_has_stepped_stays() -> None:
    model, shapes = model_and_shapes()
    opt = adamw(model)
    train(model, opt, 2)
    before = {p: copy.deepcopy(opt.state[p]) for p in model.parameters()}
    optx.scaling.mup(opt, shapes)
    for p, state in before.items():
        assert all(torch.equal(opt.state[p][key], value) for key, value in state.items())
    weight, bias = model.hidden.weight, model.hidden.bias
    was = weight.detach().clone(), bias.detach().clone()
    train(model, opt)
    assert opt.state[weight]["step"] == 3
    assert (weight - was[0]).abs().max() < 0.4 * (bias - was[1]).abs().max()


def test_names_come_of_the_model_where_the_optimizer_has_none() -> None:
    model, shapes = model_and_shapes()
    opt = torch.optim.AdamW(model.parameters(), lr=LR)
    with pytest.raises(optx.OptxError, match=r"no names.*named_parameters\(\)"):
        optx.scaling.mup(opt, Shapes(shapes.values()))
    optx.scaling.mup(opt, shapes, model=torch.nn.DataParallel(model))
    assert [g["lr"] for g in opt.param_groups] == [LR, LR / 4, LR]
    assert "param_names" not in opt.param_groups[0]
    other = torch.optim.AdamW(MLP(64).parameters())
    with pytest.raises(optx.OptxError, match="not a parameter of the model"):
        optx.scaling.mup(other, shapes, model=model)


@settings(deadline=None, max_examples=40)
@given(
    ratio=st.sampled_from([1, 2, 3, 5, 8]),
    lr=st.floats(1e-6, 1.0),
    decay=st.floats(0.0, 1.0),
    rule=st.sampled_from(["sqrt", "linear", "none"]),
    exponent=st.none() | st.floats(0.0, 1.0),
)
def test_any_width_rate_and_decay(ratio: int, lr: float, decay: float, rule: str, exponent: Any) -> None:
    model, shapes = MLP(8 * ratio), None
    shapes = optx.scaling.shapes(model, base=MLP(8), delta=MLP(16))
    exponent = exponent if rule == "sqrt" else None
    opt = adamw(model, lr=lr, weight_decay=decay)
    optx.scaling.mup(opt, shapes, decay=rule, decay_exponent=exponent)
    power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[rule] if exponent is None else exponent
    kept = 0.0 if rule == "sqrt" else decay
    for name, (rate, weight) in numbers(opt).items():
        matrix = name in ("hidden.weight", "back.weight")
        assert rate == (lr / ratio if matrix else lr)
        assert weight == pytest.approx(decay * ratio**power if matrix else kept, rel=1e-14)


@pytest.mark.parametrize("rule", ["linear", "none", "sqrt"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_at_the_base_width_training_is_the_plain_optimizers(rule: str, kind: str) -> None:
    def run(scaled: bool) -> list[torch.Tensor]:
        model, shapes = model_and_shapes(16)
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
        # By "sqrt" no vector decays, at any width.
        opt = make(model.named_parameters(), lr=LR, weight_decay=0.0 if rule == "sqrt" else DECAY)
        if scaled:
            optx.scaling.mup(opt, shapes, decay=rule)
            assert len(opt.param_groups) == 1 + (rule == "sqrt" and kind == "adamw")
        train(model, opt, 5)
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


# ---- what other optimizers do ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.RAdam,
        torch.optim.NAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.ASGD,
    ],
)
def test_decay_within_the_gradient_has_no_square_root(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, shapes = model_and_shapes()
    opt = make(model.named_parameters(), lr=LR, weight_decay=DECAY)
    with pytest.raises(optx.OptxError, match=r"decay='sqrt' is a rule for decay.*decay='linear'"):
        optx.scaling.mup(opt, shapes)
    assert len(opt.param_groups) == 1
    assert opt.param_groups[0]["lr"] == LR
    optx.scaling.mup(opt, shapes, decay="linear")
    sgd = make is torch.optim.ASGD
    assert numbers(opt)["hidden.weight"] == ((LR, DECAY) if sgd else (LR / 4, DECAY * 4))


def test_a_decay_that_comes_later_where_there_was_no_rule_for_one() -> None:
    model, shapes = model_and_shapes()
    opt = optx.scaling.mup(torch.optim.SGD(model.named_parameters(), lr=LR), shapes)
    train(model, opt)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(optx.OptxError, match=r"group 0 has weight_decay=0\.1; by its rule .* none"):
        train(model, opt)


@pytest.mark.parametrize("make", [torch.optim.RAdam, torch.optim.NAdam, torch.optim.Adam])
def test_decay_made_apart_from_the_gradient_has(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, shapes = model_and_shapes()
    opt = make(model.named_parameters(), lr=LR, weight_decay=DECAY, decoupled_weight_decay=True)
    optx.scaling.mup(opt, shapes)
    assert numbers(opt)["hidden.weight"] == (LR / 4, 2 * DECAY)


def test_decay_that_is_not_times_the_learning_rate() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    model, shapes = model_and_shapes()
    opt = library.Lion(model.parameters(), lr=LR, weight_decay=DECAY, weight_decouple=True, fixed_decay=True)
    optx.scaling.mup(opt, shapes, model=model)
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(LR, 0), (LR / 4, DECAY / 2)]
    opt = library.Lion(model.parameters(), lr=LR, weight_decay=DECAY)
    optx.scaling.mup(opt, shapes, model=model)
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(LR, 0), (LR / 4, 2 * DECAY)]


class Own(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad.sign())


def test_what_an_unknown_optimizer_is_must_be_said() -> None:
    model, shapes = model_and_shapes()
    with pytest.raises(optx.OptxError, match="Own is not known"):
        optx.scaling.mup(Own(model.named_parameters(), LR), shapes)
    opt = optx.scaling.mup(Own(model.named_parameters(), LR), shapes, optimizer="lion")
    assert [g["lr"] for g in opt.param_groups] == [LR, LR / 4]
    with pytest.raises(optx.OptxError, match="optimizer is 'adamm'"):
        optx.scaling.mup(Own(model.named_parameters(), LR), shapes, optimizer="adamm")


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.Adadelta])
def test_optimizers_with_rules_of_their_own_are_refused(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, shapes = model_and_shapes()
    with pytest.raises(optx.OptxError, match=rf"{make.__name__} .*wrong for it"):
        optx.scaling.mup(make(model.named_parameters()), shapes)


@pytest.mark.parametrize(("name", "why"), [("ASGD", "from the curvature"), ("DeMo", "by signs")])
def test_a_peers_optimizer_that_is_named_or_made_as_torchs_and_steps_otherwise(name: str, why: str) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    model = nn.Linear(8, 3)
    with pytest.raises(optx.OptxError, match=why):
        optx.scaling.mup(model, model_and_shapes()[1], lr=LR, weight_decay=0.0, optimizer=getattr(peer, name))


def test_transformers_adafactor_is_served_without_what_makes_it_special() -> None:
    transformers = pytest.importorskip("transformers")
    model, shapes = model_and_shapes()
    plain = {"scale_parameter": False, "relative_step": False, "lr": LR, "weight_decay": DECAY}
    opt = transformers.Adafactor(model.parameters(), **plain)
    optx.scaling.mup(opt, shapes)
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(LR, 0.0), (LR / 4, 2 * DECAY)]
    train(model, opt, 2)
    with pytest.raises(optx.OptxError, match="Adafactor multiplies lr by the size of each weight"):
        optx.scaling.mup(transformers.Adafactor(model.parameters()), shapes)


# ---- mistakes ----------------------------------------------------------------------------------------


def test_what_the_shapes_do_not_have() -> None:
    model, shapes = model_and_shapes()
    model.extra = nn.Linear(2, 2)
    opt = adamw(model)
    with pytest.raises(optx.OptxError, match=r"the shapes have no parameter 'extra\.weight'"):
        optx.scaling.mup(opt, shapes)
    assert len(opt.param_groups) == 1
    assert not [k for k in opt.param_groups[0] if k.startswith("optx")]
    others = [(n, p) for n, p in model.named_parameters() if "extra" not in n]
    groups = [{"params": list(model.extra.named_parameters()), "mu": False}, {"params": others}]
    opt = optx.scaling.mup(torch.optim.AdamW(groups, lr=LR), shapes)
    assert [g["lr"] for g in opt.param_groups] == [LR, LR, LR / 4, LR]


def test_shapes_of_another_model() -> None:
    _, shapes = model_and_shapes(32)
    with pytest.raises(optx.OptxError, match=r"another model's: 'first\.weight' is \(64, 12\).*\(32, 12\)"):
        optx.scaling.mup(adamw(MLP(64)), shapes)
    with pytest.raises(optx.OptxError, match="shapes is a dict"):
        optx.scaling.mup(adamw(MLP(64)), {})  # type: ignore[arg-type]


def test_twice_is_an_error() -> None:
    model, shapes = model_and_shapes()
    opt = optx.scaling.mup(adamw(model), shapes)
    with pytest.raises(optx.OptxError, match="multiply twice"):
        optx.scaling.mup(opt, shapes)
    with pytest.raises(optx.OptxError, match="multiply twice"):
        optx.wrap(opt, optx.MuAdamW(shapes))
    wrapped = optx.wrap(adamw(model), optx.MuAdamW(shapes))
    with pytest.raises(optx.OptxError, match="multiply twice"):
        optx.scaling.mup(wrapped, shapes)
    assert [g["lr"] for g in wrapped.param_groups] == [LR, LR / 4, LR]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "lr is 0.1, and the optimizer has its own"),
        ({"eps": 1e-8}, "eps is 1e-08, and the optimizer has its own"),
        ({"decay": "square"}, "decay is 'square'"),
        ({"decay": "linear", "decay_exponent": 0.5}, "two rules"),
        ({"decay_exponent": -1.0}, "decay_exponent is -1.0"),
        ({"eps": "small"}, "eps is 'small'"),
        ({"parametrization": "mup-table4"}, "Near: 'mup-table"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    model, shapes = model_and_shapes()
    with pytest.raises(optx.OptxError, match=message):
        optx.scaling.mup(adamw(model), shapes, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": LR, "weight_decay": 0.0}, "say what they are for"),
        ({"optimizer": "adamw", "weight_decay": 0.0}, "groups are made with lr"),
        ({"optimizer": "adamw", "lr": LR}, "groups are made with weight_decay"),
        ({"optimizer": "adam", "lr": LR, "weight_decay": 0.1}, "decay='sqrt' is a rule"),
        ({"optimizer": "sgd", "lr": LR, "weight_decay": 0.0, "eps": 1e-6}, "this optimizer has none"),
        ({"optimizer": "adamw", "lr": -1.0, "weight_decay": 0.0}, "lr is -1.0"),
    ],
)
def test_arguments_for_groups_of_a_model(options: dict[str, Any], message: str) -> None:
    model, shapes = model_and_shapes()
    with pytest.raises(optx.OptxError, match=message):
        optx.scaling.mup(model, shapes, **options)


@pytest.mark.parametrize("target", [3, list(MLP(4).parameters()), []], ids=["number", "tensors", "nothing"])
def test_a_target_that_is_neither(target: Any) -> None:
    _, shapes = model_and_shapes()
    with pytest.raises(optx.OptxError, match="target"):
        optx.scaling.mup(target, shapes, optimizer="adamw", lr=LR, weight_decay=0.0)


def test_a_tied_head_is_found_by_either_name() -> None:
    def make(width: int) -> nn.Module:
        model = Transformer(width)
        model.head.weight = model.tokens.weight
        return model

    model = make(64)
    shapes = optx.scaling.shapes(model, base=make(16))
    pairs = [("head.weight", model.tokens.weight)]
    opt = optx.scaling.mup(torch.optim.AdamW(pairs, lr=LR), shapes)
    assert opt.param_groups[0]["lr"] == LR
