"""Factors of muP's tables and of the weight decay rules, against the numbers of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mup_models import MLP, batch

import optx
from optx.scaling import Width
from optx.scaling._rules_of_width import (
    DECAYS,
    MUP,
    MUP_TABLE_3,
    MUP_TABLE_9,
    NAMED,
    STANDARD,
    Scale,
    parametrization_of,
)

KINDS = ("matrix", "input", "vector", "output", "scalar")


def width(kind: str, m: float, out: float | None = None) -> Width:
    fan_in = m if kind in ("matrix", "output") else 1.0
    fan_out = {"matrix": m if out is None else out, "output": 1.0, "scalar": 1.0}.get(kind, m)
    return Width("w", (4, 4), (2, 2), kind, fan_in, fan_out)


def test_decay_of_a_matrix_is_the_papers() -> None:
    def one(m: float, decay: str | float) -> tuple[float, float]:
        scale = MUP.scale(width("matrix", m), "adam", decay)
        return 3e-3 * scale.lr, 0.1 * scale.weight_decay

    assert one(4.0, "sqrt") == (7.5e-4, 0.2)
    assert one(4.0, "linear") == (7.5e-4, 0.4)
    assert one(4.0, "none") == (7.5e-4, 0.1)
    assert one(8.0, "sqrt") == pytest.approx((3.75e-4, 0.28284271), rel=1e-8)
    assert one(16.0, 0.25) == (3e-3 / 16, 0.2)
    for decay, product in (("sqrt", 0.5), ("linear", 1.0), ("none", 0.25)):
        scale = MUP.scale(width("matrix", 4.0), "adam", decay)
        assert scale.lr * scale.weight_decay == product


@pytest.mark.parametrize("kind", ["input", "vector", "output", "scalar"])
def test_nothing_but_matrices_decays_by_the_square_root(kind: str) -> None:
    assert MUP.scale(width(kind, 4.0), "adam", "sqrt").weight_decay == 0.0
    assert MUP.scale(width(kind, 4.0), "adam", "linear").weight_decay == 1.0
    assert MUP.scale(width(kind, 4.0), "adam", "none").weight_decay == 1.0


@given(m=st.floats(1.0, 512.0), family=st.sampled_from(["adam", "sgd"]), decay=st.sampled_from(DECAYS))
def test_tables_are_one_function_written_three_ways(m: float, family: str, decay: str) -> None:
    """W = M w begins with M init; Adam steps it by M lr, SGD by M**2 lr; eps is M times W's."""
    for kind in KINDS:
        found = []
        for table in (MUP, MUP_TABLE_3, MUP_TABLE_9):
            s = table.scale(width(kind, m), family, decay)
            step = s.lr * s.forward ** (1 if family == "adam" else 2)
            eps = s.eps / s.forward if family == "adam" else 1.0
            decayed = s.lr * s.weight_decay if decay != "none" else 0.0
            found.append((s.forward * s.init, step, eps, decayed))
        assert found[1] == pytest.approx(found[0], rel=1e-12)
        assert found[2] == pytest.approx(found[0], rel=1e-12)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_at_the_base_width_every_factor_is_one(name: str, kind: str, family: str) -> None:
    for decay in ("linear", "none", "sqrt"):
        scale = NAMED[name].scale(width(kind, 1.0), family, decay)
        undecayed = decay == "sqrt" and kind != "matrix" and name not in ("standard", "ntk")
        assert scale == Scale(weight_decay=0.0 if undecayed else 1.0)


def test_matrices_that_are_not_square_follow_their_own_sides() -> None:
    scale = MUP.scale(width("matrix", 4.0, out=16.0), "sgd", "linear")
    assert (scale.lr, scale.weight_decay) == (4.0, 0.25)
    scale = MUP.scale(width("matrix", 4.0, out=16.0), "adam", "linear")
    assert (scale.lr, scale.weight_decay, scale.eps, scale.init) == (0.25, 4.0, 1 / 16, 0.5)


@given(m=st.integers(1, 4096))
def test_a_whole_ratio_divides_as_the_peer_does(m: int) -> None:
    assert MUP.scale(width("matrix", float(m)), "adam", "linear").lr == 1 / m
    assert MUP.scale(width("matrix", float(m)), "adam", "linear").weight_decay == m
    assert MUP.scale(width("matrix", float(m)), "adam", "sqrt").weight_decay == pytest.approx(math.sqrt(m))


def test_standard_changes_first_sizes_alone() -> None:
    for kind in KINDS:
        scale = STANDARD.scale(width(kind, 4.0), "adam", "sqrt")
        assert scale == Scale(init=0.5 if kind in ("matrix", "output") else 1.0)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(optx.OptxError, match=r"parametrization is 'mupp'.*Near: 'mup'"):
        parametrization_of("mup", "mupp")
    with pytest.raises(optx.OptxError, match="parametrization is a int"):
        parametrization_of("mup", 3)  # type: ignore[arg-type]
    for decay in ("square", True, -0.5, 3.0, float("nan")):
        with pytest.raises(optx.OptxError, match="decay"):
            MUP.scale(width("matrix", 2.0), "adam", decay)
    with pytest.raises(optx.OptxError, match="family is 'lion'"):
        MUP.scale(width("matrix", 2.0), "lion", "sqrt")  # type: ignore[arg-type]


def test_eps_goes_as_the_gradients_do() -> None:
    """Under muP, at the first step: every kind's gradient shrinks as its eps, for each table."""
    for table in ("mup", "mup-table3", "mup-table9"):
        sizes: dict[int, dict[str, float]] = {}
        for width in (32, 512):
            torch.manual_seed(0)
            model = MLP(width)
            shapes = optx.scaling.shapes(model, base=MLP(32), delta=MLP(64))
            optx.scaling.init_(model, shapes, table)
            optx.attach(model, optx.MuReadout(shapes, parametrization=table))
            model(batch("mlp")).sum(-1).tanh().sum().backward()
            sizes[width] = {n: float(p.grad.square().mean()) ** 0.5 for n, p in model.named_parameters()}  # type: ignore[union-attr]
        for name, width in shapes.items():
            factor = NAMED[table].scale(width, "adam", "none").eps
            assert 0.6 < sizes[512][name] / sizes[32][name] / factor < 1.7, (table, name)
