"""The coordinate check names the layer that is out of scale; its numbers by hand; it leaves no trace."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.scaling import coordinate_check
from optx.scaling._coordinate_result import LayerSizes, judged, slope

WIDTHS = [64, 128, 256, 512]
HIDDEN = ("2.weight", "4.weight")


class Readout(nn.Linear):
    """Table 8's: the input is divided by the width's ratio."""

    def __init__(self, width: int, m: float) -> None:
        super().__init__(width, 3)
        self.m = m
        with torch.no_grad():
            self.weight.mul_(m**0.5)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.m)


def mlp(width: int, family: str = "adam", zero: bool = False) -> tuple[nn.Sequential, dict[str, float]]:
    """muP by hand, and each parameter's learning rate."""
    m = width / 64
    model = nn.Sequential(
        *(nn.Linear(8, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()),
        Readout(width, m),
    )
    with torch.no_grad():
        for i in (2, 4):
            model[i].bias.mul_(m**0.5)
        if zero:
            model[7].weight.zero_()
    hidden, other = (1 / m, 1.0) if family == "adam" else (1.0, m)
    return model, {name: 1e-3 * (hidden if name in HIDDEN else other) for name, _ in model.named_parameters()}


def optimizer_of(model: nn.Module, rates: Mapping[str, float], family: str) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    return torch.optim.Adam(groups, eps=1e-12) if family == "adam" else torch.optim.SGD(groups)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 8, generator=g), torch.randint(3, (32,), generator=g)


def bent(how: str, family: str, zero: bool) -> Any:
    """A maker of muP models in which one layer is out of scale: ``2.weight init``, ``4.weight lr``, ..."""
    name, _, what = how.partition(" ")

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, rates = mlp(width, family, zero)
        m = width / 64
        if what == "init":
            model.get_parameter(name).data.mul_(m**0.5)
        elif what == "small init":
            model.get_parameter(name).data.mul_(m**-0.5)
        elif what:
            rates[name] *= {"lr": m, "small lr": 1 / m}[what]
        return model, optimizer_of(model, rates, family)

    return make


# ---- whose fault it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["adam", "sgd"])
@pytest.mark.parametrize("zero", [False, True])
def test_mup_by_hand_passes(family, zero):
    check = coordinate_check(bent("", family, zero), WIDTHS, batch())
    assert check.ok, check
    assert not check.later
    assert all(abs(s) <= 0.1 for name in ("0", "2", "4") for s in check.slopes[name])
    assert all(s <= 0.1 for s in check.slopes["7"] if not math.isnan(s))
    assert math.isnan(check.slopes["7"][0]) == zero  # log of 0 is no number, and no fault
    assert "ok" in str(check)


CULPRITS = [
    *("0.weight init", "2.weight init", "4.weight init", "2.weight small init"),
    *("0.weight lr", "2.weight lr", "4.weight lr", "5.weight lr", "7.weight lr"),
    *("0.weight small lr", "2.weight small lr", "7.weight small lr"),
]


@pytest.mark.parametrize("how", CULPRITS)
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_the_layer_that_is_out_of_scale_is_named_and_no_other(how, family):
    check = coordinate_check(bent(how, family, False), WIDTHS, batch())
    assert list(check.failures) == [how[0]], check
    why = check.failures[how[0]]
    assert ("as made" in why) == ("init" in how)
    assert ("shrinks" in why) == ("small" in how)


@pytest.mark.parametrize("how", ["2.weight lr", "7.weight lr", "0.weight small lr"])
def test_it_is_named_below_a_zero_initialised_readout_too(how):
    """Nothing below it moves in the first step."""
    check = coordinate_check(bent(how, "adam", True), WIDTHS, batch())
    assert list(check.failures) == [how[0]], check
    assert math.isnan(check.updates["2"][0])


def test_one_learning_rate_for_all_fails_in_the_wide_layers():
    def make(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    check = coordinate_check(make, WIDTHS, batch(), optimizer="adam", lr=1e-2)
    assert list(check.failures) == ["2", "4"]
    assert max(check.slopes["4"][1:]) >= 0.4
    sgd = coordinate_check(make, WIDTHS, batch(), optimizer="sgd", lr=0.1)
    assert {"0", "4"} <= sgd.failures.keys()
    assert "shrinks" in sgd.failures["0"]  # the first layer stops learning
    assert "grows" in sgd.failures["4"]


def test_what_is_computed_between_modules_is_found():
    class Between(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second, self.norm = (
                nn.Linear(8, width),
                nn.Linear(width, width),
                nn.LayerNorm(width),
            )
            self.head = nn.Linear(width, 3)
            self.width = width

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.second(self.first(x) * self.width**0.5)))

    check = coordinate_check(Between, WIDTHS, batch(), optimizer="sgd", lr=1e-9)
    assert list(check.failures) == ["second"]
    assert "by no module's weights" in check.failures["second"]


def test_a_layer_after_a_square_is_not_blamed():
    """A squared ReLU makes width^1 of width^0.5, of which it is not guilty; nor is what is around."""

    class Squared(nn.Module):
        def __init__(self, width: int, bad: bool) -> None:
            super().__init__()
            self.body = nn.ModuleDict(
                {"up": nn.Linear(8, width), "act": SquaredReLU(), "down": nn.Linear(width, width)}
            )
            if bad:
                self.body["up"].weight.data.mul_((width / 64) ** 0.5)
            self.out = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            for module in self.body.values():
                x = module(x)
            return self.out(x)

    class SquaredReLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu().square()

    check = coordinate_check(lambda w: Squared(w, True), WIDTHS, batch(), optimizer="sgd", lr=1e-9)
    assert list(check.failures) == ["body.up"]
    assert "body.act" in check.later


# ---- the numbers ------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    """One layer, one step of SGD: output, own update and change, in both norms, at both widths."""
    x = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    target = torch.zeros(2, 4)

    def make(width: int) -> nn.Module:
        model = nn.Linear(2, width, bias=False)
        model.weight.data = torch.arange(2.0 * width).reshape(width, 2) / width
        return model

    def size(y: Tensor, norm: str) -> float:
        return float(y.abs().mean() if norm == "l1" else y.square().mean().sqrt())

    for norm in ("l1", "l2"):
        check = coordinate_check(
            make,
            [2, 4],
            (x, target),
            loss_fn=lambda y, _: y.square().sum() / 2,
            optimizer="sgd",
            lr=0.1,
            steps=1,
            seeds=1,
            norm=norm,
        )
        found = check.layers[""]
        for i, width in enumerate((2, 4)):
            w0 = make(width).weight.detach()
            w1 = w0 - 0.1 * (x @ w0.T).T @ x
            assert found.input[0, i] == pytest.approx(size(x, norm))
            assert found.output[0, i] == pytest.approx([size(x @ w.T, norm) for w in (w0, w1)])
            assert found.update[0, i] == pytest.approx([0.0, size(x @ (w1 - w0).T, norm)])
            assert found.change[0, i] == pytest.approx([0.0, size(x @ (w1 - w0).T, norm)])
        assert found.has_weights
        assert not found.finite_output
        assert not found.sampled


def test_an_own_update_is_not_what_the_layers_before_did():
    """Only the first layer is trained: the second's output changes, by none of its own doing."""

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 3))
        return model, torch.optim.SGD(model[0].parameters(), lr=0.1)

    check = coordinate_check(make, [8, 16], batch(), seeds=1)
    assert np.all(check.layers["1"].update == 0)
    assert np.all(check.layers["1"].change[..., 1:] > 0)
    assert np.all(check.layers["0"].update[..., 1:] == check.layers["0"].change[..., 1:])
    assert math.isnan(check.updates["1"][0])


def test_changes_of_large_outputs_are_estimates_and_say_so():
    def make(width: int) -> nn.Module:
        return nn.Linear(8, width)

    targets = torch.zeros(32, 1)
    options: dict[str, Any] = {
        "optimizer": "sgd",
        "loss_fn": lambda y, _: (y - targets).square().mean(),
        "seeds": 1,
        "lr": 1.0,
    }
    exact = coordinate_check(make, [64, 128], batch(), **options)
    rough = coordinate_check(make, [64, 128], batch(), sample=500, **options)
    assert rough.layers[""].sampled
    assert not exact.layers[""].sampled
    assert np.array_equal(rough.layers[""].output, exact.layers[""].output)
    assert rough.layers[""].change[..., 1:] == pytest.approx(exact.layers[""].change[..., 1:], rel=0.15)
    assert not np.array_equal(rough.layers[""].change, exact.layers[""].change)


@given(st.floats(-2, 2), st.floats(-5, 5), st.sets(st.integers(1, 4096), min_size=2, max_size=6))
def test_a_slope_is_the_exponent(exponent, constant, widths):
    sizes = np.array([math.exp(constant) * w**exponent for w in sorted(widths)])
    assert slope(sorted(widths), sizes) == pytest.approx(exponent, abs=1e-9)


@settings(max_examples=60)
@given(st.floats(-1, 1), st.floats(-1, 1), st.booleans())
def test_a_layer_fails_where_it_and_its_gain_stray_alike(inputs, gain, finite):
    """Inputs that stray are somebody else's fault, and an output whose size is right is nobody's."""
    widths = [8, 32, 128]
    given_ = np.array([[[w**inputs] * 2 for w in widths]])
    out = np.array([[[w ** (inputs + gain)] * 2 for w in widths]])
    zeros = np.zeros_like(out)
    sizes = LayerSizes(out, given_, zeros, zeros, finite, has_weights=True, sampled=False)
    own, tolerance = inputs + gain, 0.25
    if any(abs(abs(value) - tolerance) < 1e-3 for value in (own, gain)):
        return
    grows, shrinks = min(own, gain) > tolerance, max(own, gain) < -tolerance
    check = judged(widths, tolerance, {"layer": sizes})
    unexplained = own > tolerance and not grows
    assert bool(check.failures) == (grows or (shrinks and not finite) or unexplained)
    for name, value in (("slopes", own), ("gains", gain)):
        assert getattr(check, name)["layer"] == pytest.approx((value, value), abs=1e-6)


def test_what_chance_may_have_made_is_told_and_is_no_failure():
    widths = [2, 4]
    out = np.array([[[1.0], [1.0]], [[1.0], [4.0]]])  # slopes 0 and 2: 1.32 of the means, give or take 1
    ones = np.ones_like(out)
    check = judged(widths, 0.25, {"a": LayerSizes(out, ones, 0 * out, 0 * out, False, True, False)})
    assert check.ok
    assert "grows as width^1.32" in check.unsure["a"]
    assert "more seeds" in str(check)
    assert "unsure" in check.table()
    steady = np.array([[[1.0], [2.0]], [[1.0], [2.2]]])
    sure = judged(widths, 0.25, {"a": LayerSizes(steady, ones, 0 * out, 0 * out, False, True, False)})
    assert list(sure.failures) == ["a"]
    assert not sure.unsure


def test_standard_errors_are_over_seeds():
    widths = [2, 4]
    out = np.array([[[1.0], [2.0]], [[1.0], [8.0]]])  # slopes 1 and 3
    zeros = np.zeros_like(out)
    check = judged(widths, 9.0, {"a": LayerSizes(out, out, zeros, zeros, False, False, False)})
    assert check.errors["a"] == pytest.approx((1.0,))
    assert check.slopes["a"] == pytest.approx((math.log2(5),))
    one = judged(widths, 9.0, {"a": LayerSizes(out[:1], out[:1], zeros[:1], zeros[:1], False, False, False)})
    assert math.isnan(one.errors["a"][0])


# ---- what breaks ------------------------------------------------------------------------------------------


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


def test_a_layer_with_randomness_of_its_own_is_asked_again_with_the_same():
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5)

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(Noisy(8, width), nn.Linear(width, 3))
        return model, torch.optim.SGD(model[1].parameters(), lr=0.1)

    check = coordinate_check(make, [16, 32], batch(), seeds=1)
    assert np.all(check.layers["0"].update == 0)
    assert np.all(check.layers["0"].change == 0)


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


# ---- no trace ---------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Shared and uncalled modules, running statistics, dropout, a tuple of outputs, a part in eval mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.shared = nn.Linear(width, width)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)  # whose out_proj is never called
        self.batch_norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.unused = nn.Linear(width, width)
        self.still = nn.BatchNorm1d(width).eval()
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.drop(self.batch_norm(self.again(self.shared(self.first(x)).relu())))
        x = x + self.attention(x[None], x[None], x[None])[0][0]
        return self.head(self.still(x)), {"hidden": x}


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(fails):
    made: list[Odd] = []

    def make(width: int) -> nn.Module:
        made.append(Odd(width))
        made[-1].head.weight.grad = torch.ones(3, width)
        kept.append({k: v.clone() for k, v in made[-1].state_dict().items()})
        random.random()
        np.random.rand()
        return made[-1]

    def loss(output: Any, pair: Any) -> Tensor:
        if fails and len(made) > 1:
            raise KeyError("mine")
        return nn.functional.cross_entropy(output[0], pair[1])

    kept: list[dict[str, Tensor]] = []
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad():
        if fails:
            with pytest.raises(KeyError, match="mine"):
                coordinate_check(make, [8, 16], batch(), optimizer="adam", loss_fn=loss, seeds=1)
        else:
            coordinate_check(make, [8, 16], batch(), optimizer="adam", loss_fn=loss, seeds=1)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert len(made) == 2
    for model, state in zip(made, kept, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.first.weight.grad is None
        assert model.training
        assert not model.still.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_odd_modules_are_read():
    check = coordinate_check(
        Odd,
        [8, 16, 32],
        batch(),
        optimizer="adam",
        loss_fn=lambda out, pair: nn.functional.cross_entropy(out[0], pair[1]),
        seeds=1,
    )
    assert {"first", "shared", "attention", "batch_norm", "still", "head", ""} == {
        name for name, layer in check.layers.items() if layer.has_weights
    }  # the model itself for `unused`, attention for its out_proj
    assert "unused" not in check.layers
    assert "attention.out_proj" not in check.layers
    assert np.all(check.layers[""].update == 0)  # what is not used has no effect
    assert np.all(check.layers["attention"].update[..., 1:] > 0)
    assert np.all(check.layers["batch_norm"].update[..., 1:] > 0)
    assert check.layers["head"].finite_output


def test_training_is_what_it_is_without_the_check():
    """Readings between the steps use up no random numbers and move no running statistics."""
    seen: list[list[float]] = [[], []]

    def loss(which: int, output: Any, pair: Any) -> Tensor:
        value = nn.functional.cross_entropy(output[0], pair[1])
        seen[which].append(value.item())
        return value

    coordinate_check(
        Odd, [8, 16], batch(), optimizer="sgd", lr=0.1, loss_fn=lambda o, p: loss(0, o, p), seeds=1, steps=4
    )
    for width in (8, 16):
        torch.manual_seed(0)
        model = Odd(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss(1, model(batch()[0]), batch()).backward()
            optimizer.step()
    assert seen[0] == seen[1]


def test_batches_are_taken_in_turn_and_read_on_the_first():
    rows: list[int] = []

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return self.b(self.a(x))

    x, y = batch()
    several = [(x[:4], y[:4]), (x[:5], y[:5])]
    coordinate_check(Net, [8, 16], several, optimizer="sgd", seeds=1, steps=3)
    assert rows[: len(rows) // 2] == [4, 4, 4, 5, 4, 4, 4]  # read, train, read, train, ...


def test_no_activation_is_kept():
    """The largest tensor that outlives a pass is no larger than the sample."""
    import gc

    sizes: list[int] = []

    def loss(output: Tensor, pair: Any) -> Tensor:
        del output
        gc.collect()
        held = [t for t in gc.get_objects() if type(t) is Tensor and t.shape[:1] == (4096,)]
        sizes.append(len(held))
        return model[-1][2].weight.sum()

    model: list[Any] = []

    def make(width: int) -> nn.Module:
        model.append(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)))
        return model[-1]

    x = torch.randn(4096, 8)
    coordinate_check(make, [8, 16], (x, None), optimizer="sgd", loss_fn=loss, seeds=1, sample=16)
    assert max(sizes) <= 2 + 1  # the batch, as given and as moved; the step's own output


def test_the_picture_is_drawn(tmp_path):
    check = coordinate_check(bent("2.weight lr", "adam", True), [64, 256], batch(), seeds=2)
    check.picture(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["check.png"]
    assert "2" in check.failures
    assert "FAILS" in check.table()
