"""T-Rex:I and T-Rex:NN: where they lead, what they say of it, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counterfactual_models import examples, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.analysis import robust_counterfactual, stability


def factuals(model: nn.Module, rows: int = 6, features: int = 4) -> Tensor:
    x = examples(features, 100, 5)
    return x[model(x).argmax(1) == 0][:rows]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([0.4, 0.6, 0.75, 0.99]),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from(["closest", "nn"]),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from([None, [1], [0, 3]]),
)
def test_steps_stay_in_the_box_and_the_ball(
    seed: int, tau: float, eps: float, base: Any, norm: Any, immutable: Any
):
    model = network(seed=seed)
    x, low, high = factuals(model), torch.zeros(4), torch.tensor([1.0, 0.9, 1.0, 1.2])
    x[:, 1].clamp_(max=0.9)
    options: dict[str, Any] = {
        **{"data": examples(), "bounds": (low, high), "norm": norm, "immutable": immutable, "base": base},
        **{"tau": tau, "eps_max": eps, "k": 200, "generator": seed},
    }
    start = robust_counterfactual(model, x, 1, max_steps=0, **options)
    found = robust_counterfactual(model, x, 1, max_steps=12, eta=0.05, **options)
    assert bool(((found.x >= low) & (found.x <= high)).all())
    assert bool(((found.x - start.x).norm(dim=1) <= eps + 1e-5).all())
    assert bool(((found.x - start.x).norm(dim=1) <= 0.05 * found.steps + 1e-5).all())
    if immutable:
        assert torch.equal(found.x[:, immutable], x[:, immutable])
    # What is said of the points is so of the points that are returned, by noise that no step had.
    again = stability(model, found.x, 1, k=200, generator=seed)
    torch.testing.assert_close(found.stability, again, atol=1e-6, rtol=0)
    valid = model(found.x).argmax(1) == 1
    assert torch.equal(found.valid, valid)
    assert torch.equal(found.reached, valid & (found.stability >= tau))
    assert bool((found.stability >= start.stability).all())
    assert bool((found.steps[start.reached] == 0).all())
    far = torch.linalg.vector_norm((found.x - x).double(), 1 if norm == "l1" else 2, dim=1)
    torch.testing.assert_close(found.distance, far)


def test_a_row_stops_at_its_first_point_over_tau_whatever_the_others_do():
    model = network()
    model[2].weight.data *= 4
    model[2].bias.data *= 4
    x, options = factuals(model), {"data": examples(), "k": 300, "sigma": 0.05, "max_steps": 60}
    found = robust_counterfactual(model, x, 1, **options)
    assert bool(found.reached.all())
    assert len(set(found.steps.tolist())) > 1
    one = [robust_counterfactual(model, row[None], 1, **options) for row in x]
    torch.testing.assert_close(found.x, torch.cat([each.x for each in one]), atol=1e-3, rtol=0)
    # One step fewer is not enough.
    for each, row in zip(one, x, strict=True):
        shorter = {**options, "max_steps": int(each.steps) - 1}
        assert not bool(robust_counterfactual(model, row[None], 1, **shorter).reached)


def test_steps_have_fresh_noise_and_the_judge_has_its_own():
    """Of few samples, stepped by the judge's own noise, points would look more stable than they are."""
    model = network()
    x = factuals(model, 6)
    found = robust_counterfactual(model, x, 1, data=examples(), k=20, tau=1.0, max_steps=30, sigma=0.3)
    true = stability(model, found.x, 1, k=20_000, sigma=0.3, generator=9)
    assert float((found.stability - true).mean().abs()) < 0.03


def test_what_cannot_be_reached_is_said():
    """The probability is never above 0.7; and the closest may be below 0, of a steep model."""
    capped = lambda x: 0.7 * (40 * (x.sum(1) - 2)).sigmoid()  # noqa: E731
    x = torch.full((2, 4), 0.4)
    found = robust_counterfactual(capped, x, 1, data=examples(), output="probabilities", k=100, max_steps=40)
    assert found.valid.tolist() == [True, True]
    assert found.reached.tolist() == [False, False]
    assert float(found.stability.min()) > 0.6  # the best that there is
    steep = lambda x: 100 * (x.sum(1) - 2)  # noqa: E731
    base = robust_counterfactual(steep, x, 1, data=examples(), max_steps=0, output="logits", sigma=0.5)
    assert base.valid.all()
    spike = torch.tensor([[0.0], [1.0]])  # of the class at one point alone
    lone = robust_counterfactual(
        lambda x: 40 - 1e4 * (x[:, 0] - 1).abs(), spike[:1], 1, base=spike[1:], output="logits", max_steps=3
    )
    assert float(lone.stability) < -0.9
    assert not bool(lone.reached)
    assert bool(lone.valid)  # and not a point of the other class, whose stability is 0


def test_points_that_are_stable_but_of_another_class_have_not_reached():
    """Of three classes, 0.4 may not be the most."""
    fixed = torch.tensor([[0.55, 0.4, 0.05]]).log()
    x = examples(2, 3)
    found = robust_counterfactual(lambda x: fixed + 0 * x.sum(1, keepdim=True), x, 1, base=x, tau=0.3)
    assert bool((found.stability > 0.39).all())
    assert not bool(found.valid.any() | found.reached.any())


# ---- examples -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.sampled_from(["l1", "l2"]), st.integers(1, 30), st.sampled_from([0.3, 0.7, 0.9])
)
def test_nn_is_the_first_stable_row_of_data(seed: int, norm: Any, neighbours: int, tau: float):
    model, data = network(seed=seed), examples(rows=80, seed=seed)
    x = factuals(model, 5)
    found = robust_counterfactual(
        model, x, 1, method="nn", data=data, norm=norm, neighbours=neighbours, tau=tau, k=100
    )
    good = data[model(data).argmax(1) == 1]
    held = stability(model, good, 1, k=100)
    for i in range(len(x)):
        order = torch.linalg.vector_norm((good - x[i]).double(), 1 if norm == "l1" else 2, dim=1).argsort()
        order = order[:neighbours].tolist()
        passed = next((j for j, row in enumerate(order) if float(held[row]) >= tau), None)
        best = max(range(len(order)), key=lambda j: float(held[order[j]])) if passed is None else passed
        assert torch.equal(found.x[i], good[order[best]])  # bit for bit
        assert int(found.steps[i]) == best
        assert bool(found.reached[i]) == (passed is not None)
        assert float(found.stability[i]) == pytest.approx(float(held[order[best]]), abs=1e-6)
    assert bool(found.valid.all())


def test_nn_of_an_estimator_and_of_what_has_no_gradient():
    linear_model = pytest.importorskip("sklearn.linear_model")
    data = examples().numpy()
    regression = linear_model.LogisticRegression(C=100.0).fit(data, (data.sum(1) > 2).astype(int))
    w, b = torch.tensor(regression.coef_[0]), float(regression.intercept_[0])
    x = data[regression.predict(data) == 0][:5]
    theirs = robust_counterfactual(regression, x, 1, method="nn", data=data, k=200)
    same = lambda x: (x @ w.float() + b).detach()  # noqa: E731
    mine = robust_counterfactual(same, torch.tensor(x), 1, method="nn", data=data, k=200, output="logits")
    assert torch.equal(theirs.x, mine.x)
    torch.testing.assert_close(theirs.stability.float(), mine.stability, atol=1e-5, rtol=0)


# ---- mistakes -------------------------------------------------------------------------------------------


def refused(words: str, **changed: Any) -> None:
    model = network()
    given = {"model": model, "x": factuals(model), "data": examples(), "k": 20, **changed}
    with pytest.raises(optx.OptxError, match=f"robust_counterfactual: .*{words}"):
        robust_counterfactual(**given)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tau": 1.5}, r"tau is 1\.5; it must be between -1 and 1"),
        ({"base": "far"}, "base is 'far'"),
        ({"base": None}, "base is None"),
        ({"method": "sgd"}, "method is 'sgd'"),
        ({"norm": "linf"}, "norm is 'linf'"),
        ({"eta": 0.0}, r"eta is 0\.0"),
        ({"eps_max": -1.0}, r"eps_max is -1\.0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"target": 5}, "target is 5; it must be a class from 0 to 1"),
        ({"data": None}, "base='closest' begins with examples; pass data="),
        ({"data": None, "method": "nn"}, "method='nn' begins with examples"),
        ({"data": torch.ones(5, 3)}, r"data has rows of shape \(3,\); those of x are \(4,\)"),
        ({"data": torch.ones(5, 4).double()}, "data is torch.float64 on cpu; x is torch.float32"),
        ({"data": torch.full((5, 4), torch.nan)}, "data has numbers that are not finite"),
        ({"base": torch.ones(2, 4)}, "base has 2 rows; it must have one of each of the 6"),
        ({"base": torch.full((6, 4), 3.0)}, "row 0 of base lies outside of bounds"),
        ({"base": torch.full((6, 4), 0.5), "immutable": [1]}, "differs from x in an immutable feature"),
        ({"bounds": (0.9, 1.0)}, "row 0 of x lies outside of bounds"),
        ({"bounds": 3}, "bounds is 3; it must be two numbers"),
        ({"bounds": (1.0, 0.0)}, "every lower end must be at most the upper one"),
        ({"bounds": (torch.zeros(3), 1.0)}, r"bounds have shape \(3,\)"),
        ({"immutable": [4]}, r"immutable is \[4\]; it must be numbers of features from 0 to 3"),
        ({"immutable": torch.ones(3, dtype=torch.bool)}, r"a mask of shape \(3,\)"),
        ({"method": "nn", "immutable": [0]}, "returns examples as they are"),
        ({"method": "nn", "base": "nn"}, "base has no use in method='nn'"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], words: str):
    refused(words, **changed)


def test_a_class_without_an_example_is_refused():
    model = network()
    data = examples()
    data = data[model(data).argmax(1) == 0]
    for method in ("iterative", "nn"):
        refused(f"of the {len(data)} rows of data the model gives none the target", data=data, method=method)


def test_models_without_gradients_are_refused():
    model = network()
    refused("no gradient with respect to its input", model=lambda x: model(x).detach())
    refused("no gradient with respect to its input", model=lambda x: model(x.detach()))
    linear_model = pytest.importorskip("sklearn.linear_model")
    data = examples().numpy()
    regression = linear_model.LogisticRegression().fit(data, data.sum(1) > 2)
    refused("LogisticRegression has no gradients", model=regression, target=True)


def test_a_factual_whose_immutable_features_no_example_can_have_starts_from_itself():
    """The first feature decides alone, and may not change."""
    model = lambda x: 10 * (x[:, 0] - 0.5)  # noqa: E731
    x = torch.tensor([[0.2, 0.2], [0.3, 0.9]])
    for base in ("closest", "nn"):
        found = robust_counterfactual(
            model, x, 1, data=examples(2), base=base, immutable=[0], output="logits", k=20, max_steps=3
        )
        assert torch.equal(found.x[:, 0], x[:, 0])
        assert not bool(found.valid.any() | found.reached.any())


def test_it_prints_as_one_line():
    model = network()
    found = robust_counterfactual(model, factuals(model), 1, data=examples(), k=50, tau=0.99, max_steps=1)
    far = f"distance {found.distance.min():.3g} to {found.distance.max():.3g})"
    counts = f"6 rows: {int(found.valid.sum())} of the class, {int(found.reached.sum())} reached; "
    assert repr(found).startswith("Counterfactuals(" + counts)
    assert repr(found).endswith(far)
