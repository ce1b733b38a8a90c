"""optx.search: the best number within its budget."""

from __future__ import annotations

from typing import Any

import pytest

import optx


def test_search_finds_the_best_number_within_its_budget() -> None:
    calls: list[float] = []

    def score(lam: float) -> float:
        calls.append(lam)
        return -((lam - 1.37) ** 2)

    found = optx.search(score, {"lam": (0.0, 2.0)}, budget=25)
    assert abs(found.best["lam"] - 1.37) < 0.005
    assert len(calls) == len(set(calls)) == len(found.history) <= 25
    assert found.history[0][0] == {"lam": 1.0}
    assert found == optx.search(score, {"lam": (0.0, 2.0)}, budget=25)
    assert len(optx.search(score, {"lam": (0.0, 2.0)}, budget=3).history) == 3


def test_search_over_several_numbers() -> None:
    def loss(a: float, b: float, c: float) -> float:
        return (a - 0.3) ** 2 + 2 * (b - 0.8) ** 2 + 0.3 * a * b + (c != 3)

    found = optx.search(
        loss, {"a": (0, 1), "b": (0, 1), "c": [1, 2, 3]}, budget=120, start={"a": 0.9}, maximize=False
    )
    best = min(loss(a / 100, b / 100, 3) for a in range(101) for b in range(101))
    assert found.score <= best + 1e-3
    assert found.best["c"] == 3
    assert found.history[0][0]["a"] == 0.9


def test_search_ends_when_a_list_is_tried() -> None:
    found = optx.search(lambda lam: lam, {"lam": [0.1, 0.5, 0.3]}, budget=100)
    assert (found.best, len(found.history)) == ({"lam": 0.5}, 3)


def test_search_prefers_a_number_to_nan() -> None:
    found = optx.search(lambda x: float("nan") if x > 0.4 else x, {"x": (0.0, 1.0)}, budget=30)
    assert 0.3 < found.best["x"] <= 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 5), "space is empty"),
        (({"x": (1, 0)}, 5), "space['x'] is (1, 0); it must be (low, high) with low < high"),
        (({"x": []}, 5), "space['x'] is []"),
        (({"x": (0, 1)}, 0), "search: budget is 0"),
    ],
)
def test_search_errors(arguments: Any, message: str) -> None:
    with pytest.raises(optx.OptxError) as caught:
        optx.search(lambda x: x, *arguments)
    assert message in str(caught.value)
    with pytest.raises(optx.OptxError, match="evaluate gave None at"):
        optx.search(lambda x: None, {"x": (0, 1)}, 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(optx.OptxError, match="start has x=2"):
        optx.search(lambda x: x, {"x": (0, 1)}, 3, start={"x": 2})
