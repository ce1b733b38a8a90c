"""The closest point of a class: against closed forms, a linear program, and a fine grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counterfactual_models import examples, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optx.analysis import robust_counterfactual
from optx.analysis.counterfactual._box import Box
from optx.analysis.counterfactual._closest import beyond_plane


def closest(model: Any, x: Tensor, data: Tensor, **options: Any) -> Any:
    return robust_counterfactual(model, x, 1, data=data, max_steps=0, k=1, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.booleans(), st.booleans())
def test_the_closest_point_beyond_a_plane(seed: int, features: int, l1: bool, open_: bool):
    """Against scipy's solvers: a linear program for l1, a convex quadratic one for l2."""
    optimize = pytest.importorskip("scipy.optimize")
    g = torch.Generator().manual_seed(seed)
    slope, x, at = torch.randn(3, 1, features, generator=g, dtype=torch.float64)
    slope[0, 0] = slope[0, 0] if features == 1 else 0.0  # one that the plane does not lean on
    low, high = x - torch.rand(1, features, generator=g), x + torch.rand(1, features, generator=g)
    if open_:
        high[0, -1], low[0, -1] = torch.inf, -torch.inf
    lead = torch.randn(1, generator=g, dtype=torch.float64)
    found = beyond_plane(x, at, lead, slope, Box(low, high), "l1" if l1 else "l2")[0]
    assert bool(((found >= low[0]) & (found <= high[0])).all())
    w, lacks = slope[0].numpy(), float(-lead - (slope * (x - at)).sum())
    ends = list(zip((low - x)[0].tolist(), (high - x)[0].tolist(), strict=True))
    most = sum(abs(s) * (e[1] if s > 0 else -e[0]) for s, e in zip(w, ends, strict=True) if s)
    reached = float((slope[0] * (found - x[0])).sum())
    if most < lacks:  # the box does not reach it: the corner that comes nearest
        assert reached == pytest.approx(most, abs=1e-9)
        return
    assert reached >= lacks - 1e-9
    if l1:
        up_and_down = [(0, e[1]) for e in ends] + [(0, -e[0]) for e in ends]
        program = optimize.linprog([1.0] * (2 * features), [[*-w, *w]], [-lacks], bounds=up_and_down)
        assert float((found - x[0]).abs().sum()) == pytest.approx(program.fun, abs=1e-7)
    else:
        program = optimize.minimize(
            lambda v: v @ v,
            (found - x[0]).numpy() * 0.5,
            jac=lambda v: 2 * v,
            bounds=ends,
            constraints={"type": "ineq", "fun": lambda v: w @ v - lacks, "jac": lambda v: w},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert float((found - x[0]).square().sum()) == pytest.approx(program.fun, abs=1e-6)


def test_of_a_linear_model_it_is_the_foot_of_the_perpendicular():
    w, data = torch.tensor([3.0, 4.0]), examples(2)
    model, x = (lambda x: 10 * (x @ w - 3.5)), torch.tensor([[0.3, 0.3], [0.5, 0.2], [0.9, 0.9]])
    found = closest(model, x, data, output="logits")
    foot = x + ((3.5 - x @ w).clamp_min(0) / 25)[:, None] * w
    torch.testing.assert_close(found.x, foot, atol=1e-4, rtol=0)
    assert found.valid.tolist() == [True] * 3
    assert float(found.distance[2]) == 0.0  # it is of the class already
    by_l1 = closest(model, x, data, output="logits", norm="l1")
    torch.testing.assert_close(
        by_l1.x[0], torch.tensor([0.3, 0.65]), atol=1e-4, rtol=0
    )  # the steeper one alone


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_bent_boundary_it_is_that_of_a_grid(norm: Any, seed: int):
    model = network(2, 2, seed)
    side = torch.linspace(0, 1, 401)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        of_class = grid[model(grid).argmax(1) == 1]
        x = examples(2, 40, 7)
        x = x[model(x).argmax(1) == 0]
    found = closest(model, x, examples(2, 100), norm=norm, bounds=(0, 1))
    wanted = torch.cdist(x, of_class, 1 if norm == "l1" else 2).min(1).values.double()
    assert bool(found.valid.all())
    assert bool((found.distance >= wanted - 0.006).all())  # a cell of the grid
    assert bool(
        (found.distance <= wanted * 1.02 + 0.006).double().mean() > 0.9
    )  # some rows end in a local optimum


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["l1", "l2"]), st.integers(2, 4))
def test_it_is_nearer_than_all_examples_and_in_the_box(seed: int, norm: Any, classes: int):
    model, data = network(4, classes, seed), examples(4, 60, seed)
    if int((model(data).argmax(1) == 1).sum()) < 2:
        return
    x = examples(4, 5, seed + 1)
    found = closest(model, x, data, norm=norm, immutable=[2])
    near = closest(model, x, data, norm=norm, immutable=[2], base="nn")
    assert bool((found.distance <= near.distance + 1e-6).all())
    assert torch.equal(found.x[:, 2], x[:, 2])
    assert bool(
        ((found.x >= torch.minimum(data.amin(0), x)) & (found.x <= torch.maximum(data.amax(0), x))).all()
    )
    assert torch.equal(found.valid, model(found.x).argmax(1) == 1)
    # In float64, as float32 rounds products of one row otherwise than those of many, and the ways part.
    x, data, model = x.double(), data.double(), model.double()
    together = closest(model, x, data, norm=norm, immutable=[2]).distance
    alone = torch.cat([closest(model, row[None], data, norm=norm, immutable=[2]).distance for row in x])
    torch.testing.assert_close(together, alone, atol=1e-8, rtol=1e-6)


def test_an_estimator_is_searched_along_segments():
    ensemble = pytest.importorskip("sklearn.ensemble")
    data = examples(3).numpy()
    forest = ensemble.RandomForestClassifier(10, random_state=0).fit(data, data.sum(1) > 1.5)
    x = data[forest.predict(data) == 0][:6]
    found = robust_counterfactual(forest, x, True, data=data, max_steps=0, k=10)
    near = robust_counterfactual(forest, x, True, data=data, max_steps=0, k=10, base="nn")
    assert forest.predict(found.x.numpy()).tolist() == [True] * 6
    assert bool((found.distance < near.distance).all())


def test_a_model_of_tensors_with_axes():
    model = nn.Sequential(nn.Flatten(), network(4))
    data = examples(4).view(-1, 2, 2)
    x = data[model(data).argmax(1) == 0][:4]
    found = closest(model, x, data)
    flat = closest(model[1], x.flatten(1), data.flatten(1))
    torch.testing.assert_close(found.x.flatten(1), flat.x)
