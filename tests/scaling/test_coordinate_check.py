"""The coordinate check names the layer that is out of scale, and no other."""

from __future__ import annotations

import math

import pytest
from mup_by_hand import WIDTHS, batch, bent
from torch import Tensor, nn

from optx.scaling import coordinate_check

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny tensors


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


@pytest.mark.long(keep=3)
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


def test_the_picture_is_drawn(tmp_path):
    check = coordinate_check(bent("2.weight lr", "adam", True), [64, 256], batch(), seeds=2)
    check.picture(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["check.png"]
    assert "2" in check.failures
    assert "FAILS" in check.table()
