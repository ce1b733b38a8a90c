"""abc-parametrisations as rules of width: the named ones are the tables, custom ones their exponents."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optx._errors import OptxError
from optx.scaling import ABC, Width, abc
from optx.scaling._rules_of_width import NAMED, parametrization_of

KINDS = ("matrix", "input", "vector", "output", "scalar")
ratios = st.floats(0.25, 64)
few = settings(max_examples=15)
families = pytest.mark.parametrize("family", ["sgd", "adam"])


def width(kind, fan_in=4.0, fan_out=4.0):
    inward, outward = kind in ("matrix", "output"), kind in ("matrix", "input", "vector")
    return Width("w", (8,), (8,), kind, fan_in if inward else 1.0, fan_out if outward else 1.0)


@families
@pytest.mark.parametrize("decay", ["sqrt", "linear", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "table"),
    [("standard", "standard"), ("ntk", "ntk"), ("mean_field", "mean_field"), ("mup", "mup-table9")],
)
@settings(max_examples=4)  # of a power of one number, which two settle
@given(ratio=ratios)
def test_named_exponents_are_the_tables(name, table, kind, family, decay, ratio):
    exponents = ABC.named(name, 3, family)
    one = width(kind, ratio, ratio)
    assert astuple(exponents.scale(one, family, decay)) == pytest.approx(
        astuple(NAMED[table].scale(one, family, decay)), rel=1e-12
    )


@families
@pytest.mark.parametrize("kind", KINDS)
@few
@given(theta=st.floats(-1, 1), ratio=ratios)
def test_a_shift_moves_from_weights_to_multipliers_and_shrinks_as_much(kind, family, theta, ratio):
    """Multiplier times first size, and the share that a step decays, are those of every form."""
    one = ABC.named("mup", 3, family)
    here, there = (form.scale(width(kind, ratio, ratio), family, "sqrt") for form in (one, one.shift(theta)))
    assert there.forward * there.init == pytest.approx(here.forward * here.init, rel=1e-9)
    assert there.lr * there.weight_decay == pytest.approx(here.lr * here.weight_decay, rel=1e-9)
    step = 2 if family == "sgd" else 1
    assert there.lr * there.forward**step == pytest.approx(here.lr * here.forward**step, rel=1e-9)


@few
@given(
    a=st.tuples(*[st.fractions(-1, 1, max_denominator=4)] * 3),
    b=st.tuples(*[st.fractions(-1, 1, max_denominator=4)] * 3),
    c=st.tuples(*[st.fractions(-1, 1, max_denominator=4)] * 3),
    fan_in=ratios,
    fan_out=ratios,
)
@families
def test_custom_exponents_are_powers_of_width(family, a, b, c, fan_in, fan_out):
    exponents = abc(a, b, c, optimizer=family)
    for layer, (kind, n) in enumerate([("input", fan_out), ("matrix", fan_in), ("output", fan_in)]):
        found = exponents.scale(width(kind, fan_in, fan_out), family, "none")
        assert found.forward == pytest.approx(n ** -float(a[layer]))
        assert found.init == pytest.approx(n ** -float(b[layer]))
        assert found.lr == pytest.approx(n ** -float(c[layer]))
    vector = exponents.scale(width("vector", fan_out=fan_out), family, "none")
    rate = c[0] + (2 if family == "sgd" else 1) * a[0]
    assert (vector.forward, vector.init) == (1.0, 1.0)
    assert vector.lr == pytest.approx(fan_out ** -float(rate))


@families
@pytest.mark.parametrize("name", ["standard", "ntk", "mup", "mean_field"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_base_width_all_factors_are_one(name, kind, family):
    assert set(astuple(ABC.named(name, 3, family).scale(width(kind, 1.0, 1.0), family, "none"))) == {1.0}


def test_weights_decay_as_before_where_no_features_are_learnt():
    for decay in ("sqrt", "linear"):
        assert ABC.named("ntk").scale(width("matrix"), "sgd", decay).weight_decay == 1.0
    assert ABC.named("mean_field").scale(width("vector"), "sgd", "sqrt").weight_decay == 0.0
    mup = ABC.named("mup", optimizer="adam").scale(width("matrix", 16.0, 16.0), "adam", "sqrt")
    assert mup.weight_decay == pytest.approx(math.sqrt(16))


def test_exponents_of_the_other_family_are_refused():
    with pytest.raises(OptxError, match=r"mup: these exponents are for sgd.* the family of adam"):
        ABC.named("mup").scale(width("output"), "adam", "none")
    with pytest.raises(OptxError, match="abc: these exponents are for adam"):
        abc([0, 0], [0, 0], 0, optimizer="adam").scale(width("vector"), "sgd", "none")


def test_a_hidden_weight_without_exponents_of_its_own_is_refused():
    shallow = ABC.named("mup", 1)
    assert shallow.scale(width("output"), "sgd", "none").forward == 0.5
    with pytest.raises(OptxError, match=r"'w' is a hidden layer's weight.*of no such layer"):
        shallow.scale(width("matrix"), "sgd", "none")
    unlike = abc([0, 0, 0.5, 0.5], [0, 0.5, 0, 0], 0)
    with pytest.raises(OptxError, match=r"'w' is a hidden layer's.*2 such layers, not all alike"):
        unlike.scale(width("matrix"), "sgd", "none")
    alike = abc([0, 0.5, 0.5, 0.5], [0, 0, 0, 0], 0)
    assert alike.scale(width("matrix"), "sgd", "none").forward == 0.5


def test_it_is_taken_for_a_parametrization():
    one = abc([0, 0.5], [0, 0], 0)
    assert parametrization_of("mup", one) is one
    assert parametrization_of("mup", "ntk").name == "ntk"
