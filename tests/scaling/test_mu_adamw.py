"""`optx.MuAdamW` within `optx.wrap`: with other transforms, fused, taken off; table against table."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mup_models import MLP, batch
from torch import nn

import optx
from optx.scaling import Shapes

LR, DECAY = 3e-3, 0.1
# What these train multiplies no output: the rules of its groups are looked at, not what it learns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no optx.MuReadout does:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*has the size that the model was made with:UserWarning"),
]


def model_and_shapes(width: int = 64) -> tuple[Any, Shapes]:
    torch.manual_seed(0)
    model = MLP(width)
    return model, optx.scaling.shapes(model, base=MLP(16), delta=MLP(32))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), **{"lr": LR, "weight_decay": DECAY, **options})


def train(model: nn.Module, opt: Any, steps: int = 5) -> list[torch.Tensor]:
    for _ in range(steps):
        opt.zero_grad()
        model(batch("mlp").to(next(model.parameters()).dtype)).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


CHAINS: dict[str, Any] = {
    "alone": lambda model: [],
    "PerpGrad": lambda model: [optx.PerpGrad()],
    "AdamR": lambda model: [optx.AdamR(weight=0.05)],
    "both": lambda model: [optx.PerpGrad(), optx.AdamR(weight=0.05)],
    "HFT": lambda model: [optx.HFT(model, blocks=r"hidden|back")],
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("first", [True, False])
def test_at_the_base_width_it_changes_no_bit(chain: str, fused: bool, first: bool) -> None:
    def run(mu: bool) -> list[torch.Tensor]:
        model, shapes = model_and_shapes(16)
        others = CHAINS[chain](model)
        scaled = [optx.MuAdamW(shapes, decay="linear")] if mu else []
        opt = optx.wrap(adamw(model), *(scaled + others if first else others + scaled), fused=fused)
        return train(model, opt)

    assert all(map(torch.equal, run(True), run(False)))


def test_at_the_base_width_the_papers_rule_is_matrices_alone() -> None:
    """Bit-identical to the plain optimizer whose vectors do not decay, fused and split in two."""
    model, shapes = model_and_shapes(16)
    ours = train(model, optx.wrap(adamw(model), optx.MuAdamW(shapes), fused=True))
    model, _ = model_and_shapes(16)
    names = dict(model.named_parameters())
    matrices = [names.pop("hidden.weight"), names.pop("back.weight")]
    groups = [{"params": list(names.values()), "weight_decay": 0.0}, {"params": matrices}]
    plain = optx.wrap(torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY), fused=True)
    assert all(map(torch.equal, ours, train(model, plain)))


@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "HFT"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_that_of_groups_written_by_hand(chain: str, fused: bool) -> None:
    model, shapes = model_and_shapes()
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes), *CHAINS[chain](model), fused=fused)
    assert {one.path for one in opt.plan()} == {"fused cpu" if fused else "foreach"}
    ours = train(model, opt)
    model, _ = model_and_shapes()
    matrices = [model.hidden.weight, model.back.weight]
    vectors = [model.first.weight, model.first.bias, model.hidden.bias, model.head.weight]
    groups = [
        {"params": vectors, "weight_decay": 0.0, "eps": 2.5e-9},
        {"params": matrices, "lr": LR / 4, "weight_decay": 2 * DECAY, "eps": 2.5e-9},
        {"params": [model.head.bias], "weight_decay": 0.0},
    ]
    hand = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
    assert all(map(torch.equal, ours, train(model, optx.wrap(hand, *CHAINS[chain](model), fused=fused))))


def test_the_first_step_finds_the_groups_as_they_were_split() -> None:
    """Else it would make every kernel and table anew, and tell all transforms that groups have come."""
    model, shapes = model_and_shapes()
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes))
    stepper = opt._stepper
    train(model, opt, 1)
    assert opt._stepper is stepper


def test_the_plan_shows_the_factors() -> None:
    model, shapes = model_and_shapes()
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes), optx.PerpGrad())
    shown = str(opt.plan())
    assert "MuAdamW(lr x 0.25, weight_decay x 2, eps x 0.25) -> PerpGrad(rescale=True) -> AdamW" in shown
    assert "MuAdamW(lr x 1, weight_decay x 0, eps x 1)" in shown
    assert "MuAdamW(shapes=shapes)" in repr(opt)
    assert repr(optx.MuAdamW(shapes, decay_exponent=0.25)) == "MuAdamW(shapes=shapes, decay_exponent=0.25)"


def test_remove_gives_the_optimizer_back() -> None:
    model, shapes = model_and_shapes()
    base = adamw(model)
    before = dict(base.param_groups[0])
    opt = optx.wrap(base, optx.MuAdamW(shapes), optx.PerpGrad())
    train(model, opt, 2)
    for group in opt.param_groups:
        group["lr"] /= 2
    assert opt.remove() is base
    (group,) = base.param_groups
    assert group == {**before, "lr": LR / 2}
    assert [id(p) for p in group["params"]] == [id(p) for p in before["params"]]
    assert base.state[model.back.weight]["step"] == 2
    base.param_groups[0]["lr"] = 1e-4
    train(model, base, 1)  # nothing looks at it any more
    optx.wrap(base, optx.MuAdamW(shapes))
    assert [g["lr"] for g in base.param_groups] == [1e-4, 2.5e-5, 1e-4]


def test_what_mup_wrote_outlives_a_wrapper() -> None:
    model, shapes = model_and_shapes()
    base = optx.scaling.mup(adamw(model), shapes)
    opt = optx.wrap(base, optx.PerpGrad())
    train(model, opt, 1)
    opt.remove()
    assert [g["optx.mu.lr"] for g in base.param_groups] == [1.0, 0.25, 1.0]
    base.param_groups[0]["lr"] = 1.0
    with pytest.raises(optx.OptxError, match="by their widths"):
        train(model, base, 1)


class Refuses(optx.Transform):
    name = "refuses"

    def bind(self, optimizer: Any) -> None:
        raise optx.OptxError("no")


def test_where_another_transform_can_not_be_bound_nothing_is_split() -> None:
    model, shapes = model_and_shapes()
    base = adamw(model)
    listed, group = base.param_groups, base.param_groups[0]
    params = list(group["params"])
    with pytest.raises(optx.OptxError, match="no"):
        optx.wrap(base, optx.MuAdamW(shapes), Refuses())
    assert base.param_groups is listed
    assert [id(one) for one in listed] == [id(group)]
    assert list(map(id, group["params"])) == list(map(id, params))
    assert (group["lr"], group["weight_decay"], group["eps"]) == (LR, DECAY, 1e-8)
    assert not [key for key in group if key.startswith("optx.mu.")]
    optx.wrap(base, optx.MuAdamW(shapes))
    assert len(base.param_groups) == 3


@pytest.mark.long
def test_transforms_added_later() -> None:
    model, shapes = model_and_shapes()
    opt = optx.wrap(adamw(model), optx.PerpGrad())
    train(model, opt, 1)
    opt = optx.wrap(opt, optx.MuAdamW(shapes))
    assert [g["lr"] for g in opt.param_groups] == [LR, LR / 4, LR]
    train(model, opt, 1)
    opt = optx.wrap(opt, optx.AdamR())
    train(model, opt, 1)
    assert [one.path for one in opt.plan()] == ["fused cpu"] * 3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.ASGD])
def test_bases_of_another_family(base: Any) -> None:
    model, shapes = model_and_shapes()
    with pytest.raises(optx.TransformError, match=rf"{base.__name__} does not step as AdamW"):
        optx.wrap(base(model.named_parameters(), lr=0.1), optx.MuAdamW(shapes))
    with pytest.raises(optx.OptxError, match="shapes is a int"):
        optx.MuAdamW(3)  # type: ignore[arg-type]


def test_it_serves_one_optimizer() -> None:
    model, shapes = model_and_shapes()
    mu = optx.MuAdamW(shapes)
    optx_of_first = optx.wrap(adamw(model), mu)
    with pytest.raises(optx.TransformError, match="serves another optimizer"):
        optx.wrap(adamw(model), mu)
    assert len(optx_of_first.param_groups) == 3


def test_bfloat16_weights_are_rounded_as_without() -> None:
    model, shapes = model_and_shapes()
    model.bfloat16()
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes), rounding="kahan", fused=True)
    assert all(torch.isfinite(p).all() for p in train(model, opt))
    assert all(g["optx.step"] == 5 for g in opt.param_groups)


# ---- tables 3, 8 and 9 -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    ratio=st.sampled_from([2, 3, 4]),
    decay=st.sampled_from(["sqrt", "linear"]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    eps=st.sampled_from([0.0, 1e-3]),
    family=st.sampled_from(["adam", "sgd"]),
)
def test_three_tables_train_one_function(
    ratio: int, decay: str, weight_decay: float, eps: float, family: str
) -> None:
    """From equal effective weights, in float64, with the forward multipliers that each asks for."""
    decay = "linear" if family == "sgd" else decay
    found: list[torch.Tensor] = []
    for table in ("mup", "mup-table3", "mup-table9"):
        torch.manual_seed(0)
        model = MLP(8 * ratio).double()
        shapes = optx.scaling.shapes(model, base=MLP(8))
        rules = optx.scaling._rules_of_width.NAMED[table]
        gain = {name: rules.scale(w, "adam", "none").forward for name, w in shapes.items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.div_(gain[name])
        made = {"lr": 1e-2, "weight_decay": weight_decay}
        make: Any = torch.optim.SGD if family == "sgd" else torch.optim.AdamW
        opt = make(model.named_parameters(), **made, **({} if family == "sgd" else {"eps": eps}))
        optx.scaling.mup(opt, shapes, parametrization=table, decay=decay)

        def forward(model: nn.Module = model, gain: dict[str, float] = gain) -> torch.Tensor:
            scaled = {n: p * gain[n] for n, p in model.named_parameters()}
            return torch.func.functional_call(model, scaled, (batch("mlp").double(),))

        for _ in range(6):
            opt.zero_grad()
            (forward() - 1.0).square().mean().backward()
            opt.step()
        found.append(forward().detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


def test_in_the_steady_state_entries_have_the_size_of_the_paper() -> None:
    """Under gradients of noise: rms = sqrt(lr / (2 weight_decay)), so by the rule it falls as m**-0.75."""
    found = []
    for ratio in (1, 4):
        shapes = optx.scaling.shapes(MLP(8 * ratio), base=MLP(8), delta=MLP(16))
        w = nn.Parameter(torch.zeros(16 * ratio, 8 * ratio))
        opt = torch.optim.AdamW([("hidden.weight", w)], lr=1e-3, weight_decay=4.0, eps=0.0)
        opt = optx.scaling.mup(opt, shapes)
        (group,) = opt.param_groups
        rng, sizes = torch.Generator().manual_seed(0), []
        steps = int(3 / (group["lr"] * group["weight_decay"]))
        for step in range(2 * steps):
            w.grad = torch.randn(w.shape, generator=rng)
            opt.step()
            if step >= steps:
                sizes.append(float(w.detach().square().mean()))
        rms = (sum(sizes) / len(sizes)) ** 0.5
        assert rms == pytest.approx((group["lr"] / (2 * group["weight_decay"])) ** 0.5, rel=0.06)
        found.append(rms)
    assert found[1] / found[0] == pytest.approx(4**-0.75, rel=0.1)


# ---- what the model has to do ------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_a_readout_that_is_not_multiplied_is_noticed_at_the_first_step() -> None:
    for table, attached, warns in (("mup", False, 1), ("mup", True, 0), ("mup-table3", False, 0)):
        model, shapes = model_and_shapes()
        if attached:
            optx.attach(model, optx.MuReadout(shapes))
        opt = optx.wrap(adamw(model), optx.MuAdamW(shapes, parametrization=table))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(model, opt, 2)
        found = [str(one.message) for one in said if "MuReadout" in str(one.message)]
        assert len(found) == warns
        assert all("'head.weight' reads out" in one and "multiplied by 0.25" in one for one in found)


def test_a_checkpoint_of_the_plain_optimizer_is_refused_in_words() -> None:
    model, shapes = model_and_shapes()
    plain = adamw(model)
    train(model, plain, 1)
    opt = optx.wrap(adamw(model), optx.MuAdamW(shapes))
    groups = [dict(group) for group in opt.param_groups]
    with pytest.raises(optx.OptxError, match=r"has 1 param groups and this optimizer \d, split by width"):
        opt.load_state_dict(plain.state_dict())
    assert not opt.state
    assert [{**a, "params": 0} for a in groups] == [{**b, "params": 0} for b in opt.param_groups]
