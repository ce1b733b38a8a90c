"""abc-parametrisations in their exponents alone: the paper's table, its symmetry, what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optx._errors import OptxError
from optx.scaling import ABC, abc

HALF = Fraction(1, 2)
depths = pytest.mark.parametrize("hidden", [1, 2, 3, 7])
families = pytest.mark.parametrize("optimizer", ["sgd", "adam"])
fractions = st.fractions(-2, 2, max_denominator=6)


def standard(hidden, c):
    return abc([0] * (hidden + 1), [0] + [0.5] * hidden, c)


# ---- the paper's points ---------------------------------------------------------------------------------


@depths
def test_r_of_the_named_points(hidden):
    assert ABC.named("ntk", hidden).classify().r == HALF
    assert ABC.named("mup", hidden).classify().r == 0
    assert ABC.named("mean_field", hidden).classify().r == 0
    assert standard(hidden, 1).classify().r == (Fraction(3, 2) if hidden == 1 else HALF)
    assert standard(hidden, 0).classify().r == (0 if hidden == 1 else -1)


@depths
def test_regimes_of_the_named_points(hidden):
    named = {name: ABC.named(name, hidden).classify() for name in ("standard", "ntk", "mup", "mean_field")}
    assert {name: found.regime for name, found in named.items()} == {
        "standard": "unstable",
        "ntk": "kernel",
        "mup": "features",
        "mean_field": "features",
    }
    assert not named["standard"].stable
    assert not named["standard"].trivial
    assert all(found.stable and not found.reasons for name, found in named.items() if name != "standard")
    assert standard(hidden, 1).classify().regime == "kernel"


def test_one_hidden_layer_of_the_standard_point_fails_by_its_readout():
    """r is 0, and it is unstable all the same: 2 a + c is 0."""
    reasons = standard(1, 0).classify().reasons
    assert "the readout's steps change the output by width^1" in reasons
    assert not any("features blow up" in reason for reason in reasons)


def test_exponents_of_the_paper():
    mup = ABC.named("mup", 3)
    assert (mup.a, mup.b, mup.c) == ((-HALF, 0, 0, HALF), (HALF,) * 4, (0,) * 4)
    ntk = ABC.named("ntk", 3)
    assert (ntk.a, ntk.b, ntk.c) == ((0, HALF, HALF, HALF), (0,) * 4, (0,) * 4)
    mean_field = ABC.named("mean_field", 1)
    assert (mean_field.a, mean_field.b, mean_field.c) == ((0, 1), (0, 0), (-1, -1))
    assert abc(mean_field.a, mean_field.b, -1).classify() == mean_field.classify()


def test_the_literatures_mean_field_in_every_layer_does_not_move():
    """1 / width in all layers but the first: outputs of a hidden layer vanish, a + b is 1 there."""
    found = abc([0, 1, 1], [0, 0, 0], -1).classify()
    assert found.reasons == ("a + b of each hidden layer is 1, not 1/2",)


@depths
def test_a_slow_rate_is_trivial(hidden):
    mup = ABC.named("mup", hidden)
    found = abc(mup.a, mup.b, Fraction(1, 4)).classify()
    assert (found.stable, found.trivial, found.regime, found.r) == (True, True, "trivial", Fraction(1, 4))


def test_a_small_readout_alone_is_no_kernel():
    """a + b of the readout above 1 needs its own steps: 2 a + c = 1."""
    found = abc([-0.5, 0, 0.5], [0.5, 0.5, 2], 0).classify()
    assert found.regime == "features"


def test_features_alone_may_move_the_output_or_blow_it_up():
    """The first layer of the NTK point, with a readout too slow to count; and at a rate of its own."""
    slow_readout = abc([0, 0.5], [0, 0], [0, 0.5]).classify()
    assert (slow_readout.regime, slow_readout.r) == ("kernel", HALF)
    fast_features = abc([0, 0.5], [0, 0], [-0.25, 0]).classify()
    assert fast_features.r == Fraction(1, 4)
    assert fast_features.reasons == ("the features' change changes the output by width^1/4",)


@depths
def test_conditions_one_by_one(hidden):
    mup = ABC.named("mup", hidden)
    for layer, told in enumerate(["of the first layer is", "of each hidden layer is"][:hidden]):
        b = list(mup.b)
        b[layer] += Fraction(1, 8)
        assert any(told in reason for reason in abc(mup.a, b, 0).classify().reasons)
    wide = abc(mup.a, [*mup.b[:-1], Fraction(-1, 8)], 0).classify()
    assert any("of the readout is 3/8, less than 1/2" in reason for reason in wide.reasons)
    fast = abc(mup.a, mup.b, Fraction(-1, 4)).classify()
    assert fast.r == -HALF  # the readout's weights grow as width^1/4, and features with them
    assert any("features blow up" in reason for reason in fast.reasons)
    assert any("the readout's steps" in reason for reason in fast.reasons)


@depths
def test_adam_has_a_kernel_and_features_too(hidden):
    found = [ABC.named(name, hidden, "adam").classify() for name in ("standard", "ntk", "mup", "mean_field")]
    assert [one.regime for one in found] == ["unstable", "kernel", "features", "features"]
    assert found[1].r == HALF


def test_tables_3_and_8_of_tensor_programs_5_learn_features_with_adam():
    assert abc([0, 0, 0], [0, 0.5, 1], [0, 1, 1], optimizer="adam").classify().regime == "features"
    assert abc([0, 0, 1], [0, 0.5, 0], [0, 1, 0], optimizer="adam").classify().regime == "features"
    assert abc([0, 0, 1], [0, 0.5, 0], [-1, 0, -1]).classify().regime == "features"  # and SGD's columns
    assert abc([0, 0, 0], [0, 0.5, 1], [-1, 0, 1]).classify().regime == "features"


# ---- symmetry -------------------------------------------------------------------------------------------


@pytest.mark.long(keep=2)
@families
@given(data=st.data())
def test_a_shift_changes_no_class(optimizer, data):
    layers = data.draw(st.integers(2, 5))
    rows = st.lists(fractions, min_size=layers, max_size=layers)
    one = abc(data.draw(rows), data.draw(rows), data.draw(rows), optimizer=optimizer)
    theta = data.draw(fractions | st.floats(-3, 3))
    assert one.shift(theta).classify() == one.classify()
    back = one.shift(theta).shift(-theta)
    assert back == one


@families
@pytest.mark.parametrize("name", ["standard", "ntk", "mup", "mean_field"])
@given(theta=st.floats(-3, 3))
def test_a_shift_of_named_points_changes_no_class(optimizer, name, theta):
    one = ABC.named(name, 3, optimizer)
    assert one.shift(theta).classify() == one.classify()


def test_how_a_shift_moves_the_rate():
    for optimizer, factor in (("sgd", 2), ("adam", 1)):
        one = ABC.named("mup", 2, optimizer)
        other = one.shift("1/3")
        assert [y - x for x, y in zip(one.c, other.c, strict=True)] == [-Fraction(factor, 3)] * 3
        assert [x + y for x, y in zip(one.a, one.b, strict=True)] == [
            x + y for x, y in zip(other.a, other.b, strict=True)
        ]


# ---- exponents and errors -------------------------------------------------------------------------------


def test_floats_near_a_fraction_are_that_fraction():
    assert abc([1 / 3, 0.1 + 0.2], ["1/3", "0.5"], 1).a == (Fraction(1, 3), Fraction(3, 10))
    assert abc([0, 0.5 - 1e-12], [0, 0], 0) == abc([0, "1/2"], [0, 0], 0)
    assert abc([0, math.pi], [0, 0], 0).a[1] == Fraction(math.pi)


def test_rounding_does_not_decide():
    third = abc([-(0.1 + 0.2 + 0.2), 0.5], [math.sqrt(0.25), math.sin(math.pi / 6)], 1e-14).classify()
    assert (third.regime, third.r) == ("features", 0)
    root = math.sqrt(2) / 7  # no fraction: sums of floats are off by rounding
    mup = abc([-0.5 + root, 0.5 + root], [0.5 - root, 0.5 - root], -2 * root)
    assert mup.classify().regime == "features"


def test_it_is_shown_in_fractions():
    assert str(ABC.named("mup")) == "mup, sgd: a = (-1/2, 0, 1/2), b = (1/2, 1/2, 1/2), c = (0, 0, 0)"


def test_one_rate_or_one_a_layer():
    assert abc([0, 1], [0, 0], -1) == abc([0, 1], [0, 0], [-1, -1])
    assert abc([0, 1], [0, 0], "-1") == abc([0, 1], [0, 0], -1.0)


@pytest.mark.parametrize(
    ("a", "b", "c", "told"),
    [
        ([0], [0], 0, "have 1, 1 and 1 exponents"),
        ([0, 0], [0, 0, 0], 0, "have 2, 3 and 2 exponents"),
        ([0, 0], [0, 0], [0, 0, 0], "have 2, 2 and 3 exponents"),
        (0, [0, 0], 0, "a is 0; it must be a row"),
        ([0, "half"], [0, 0], 0, "a holds 'half'"),
        ([0, 0], [0, math.nan], 0, "b holds nan"),
        ([0, 0], [0, True], 0, "b holds True"),
        ([0, 0], [0, 0], math.inf, "c holds inf"),
        ([0, 0], [0, 0], None, "c holds None"),
    ],
)
def test_what_is_no_row_of_exponents_is_refused(a, b, c, told):
    with pytest.raises(OptxError, match="abc: ") as caught:
        abc(a, b, c)
    assert told in str(caught.value)


def test_other_names_are_refused():
    with pytest.raises(OptxError, match=r"ABC\.named: name is 'mupp'"):
        ABC.named("mupp")
    with pytest.raises(OptxError, match=r"ABC\.named: hidden is 0"):
        ABC.named("mup", 0)
    with pytest.raises(OptxError, match="optimizer is 'lion'"):
        abc([0, 0], [0, 0], 0, optimizer="lion")
    with pytest.raises(OptxError, match="shift: theta holds 'x'"):
        ABC.named("mup").shift("x")
