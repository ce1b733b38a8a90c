"""Magnitude, and what all methods share: exact counts, patterns, and which of equals go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx import Magnitude, OptxError, ShapeError
from optx.pruning import _method
from optx.pruning._method import check_finite, keep_in_rows


def lowest(scores: Any, count: int) -> Any:
    """A mask without the lowest, by sorting pairs of score and place."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    kept = np.ones(len(scores), dtype=bool)
    kept[order[:count]] = False
    return kept


def by_hand(weight: Tensor, sparsity: float, pattern: str | None, granularity: str) -> Any:
    size = np.abs(weight.numpy())
    rows, columns = size.shape
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        return np.stack([np.concatenate([lowest(part, n) for part in row.reshape(-1, m)]) for row in size])
    if granularity == "row":
        return np.stack([lowest(row, int(columns * sparsity)) for row in size])
    return lowest(size.reshape(-1), int(rows * columns * sparsity)).reshape(rows, columns)


@given(
    st.integers(1, 7),
    st.integers(1, 6),
    st.sampled_from([None, "1:2", "2:4", "4:8", "1:3", "5:6"]),
    st.floats(0, 0.999),
    st.sampled_from(["layer", "row"]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_masks_are_those_of_plain_sorting(
    rows: int, groups: int, pattern: str | None, sparsity: float, granularity: str, seed: int, ties: bool
) -> None:
    columns = groups * (int(pattern.split(":")[1]) if pattern else 5)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = (weight * 2).round() if ties else weight
    before = weight.clone()
    method = Magnitude(None if pattern else sparsity, pattern=pattern, granularity=granularity)
    kept, new = method.prune_matrix(weight)
    assert np.array_equal(kept.numpy(), by_hand(weight, sparsity, pattern, granularity))
    assert torch.equal(new, weight * kept)
    assert torch.equal(weight, before)
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        assert bool(((~kept).view(rows, -1, m).sum(2) == n).all())


def test_rows_are_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).abs()
    whole = keep_in_rows(score, 5)
    monkeypatch.setattr(_method, "_PIECE", 32)
    assert torch.equal(keep_in_rows(score, 5), whole)


@pytest.mark.parametrize("width", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("values", [1, 3, 1000])
def test_rows_of_any_width_with_and_without_ties(width: int, values: int) -> None:
    score = torch.randint(values, (30, width), generator=torch.Generator().manual_seed(width)).float()
    for count in range(width + 1):
        for own in (score, score.double()):
            kept = keep_in_rows(own, count).numpy()
            assert np.array_equal(kept, np.stack([lowest(row, count) for row in score.numpy()]))


def test_sparsity_is_the_patterns_or_a_half() -> None:
    assert Magnitude().share == 0.5
    assert Magnitude(pattern="1:4").share == 0.25
    assert Magnitude(0.5, pattern="4:8").share == 0.5
    assert Magnitude(0.75).sparsity == 0.75
    assert repr(Magnitude(0.75)) == "Magnitude(sparsity=0.75, pattern=None, granularity='layer')"
    assert int((~Magnitude(0.0).prune_matrix(torch.ones(2, 2))[0]).sum()) == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "a"])
def test_shares_that_are_none(sparsity: Any) -> None:
    with pytest.raises(OptxError, match=r"Magnitude: sparsity is"):
        Magnitude(sparsity)


@pytest.mark.parametrize("pattern", ["2:2", "3:2", "0:4", "4", "2:", "a:b", 24, "-1:4", " 2:4", "2:4\n"])
def test_patterns_that_are_none(pattern: Any) -> None:
    with pytest.raises(OptxError, match="must be 'n:m' with 0 < n < m"):
        Magnitude(pattern=pattern)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(OptxError, match=r"sparsity is 0.7, and pattern '2:4' prunes 0.5 of all"):
        Magnitude(0.7, pattern="2:4")
    with pytest.raises(OptxError, match="granularity is 'column'; it must be one of 'layer', 'row'"):
        Magnitude(granularity="column")


def test_what_can_not_be_pruned_is_told_before_it_is_tried() -> None:
    Magnitude(pattern="2:4").check_shape("a", 8)
    Magnitude().check_shape("a", 7)
    with pytest.raises(ShapeError, match=r"'a' has 6 inputs, which pattern '2:4' doesn't divide"):
        Magnitude(pattern="2:4").check_shape("a", 6)
    for odd in (float("nan"), float("inf")):
        with pytest.raises(OptxError, match="'a' has inf or nan"):
            check_finite("a", torch.tensor([[1.0, odd]]))


def test_a_model_is_pruned_as_the_method_says() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Conv2d(4, 3, 2)).double()
    old = [module.weight.detach().clone() for module in model]
    masks = optx.prune(model, Magnitude(pattern="2:4"))
    for name, weight, module in zip(masks, old, model, strict=True):
        kept = Magnitude(pattern="2:4").prune_matrix(weight.reshape(len(weight), -1))[0]
        assert torch.equal(masks[name], kept.reshape(weight.shape))
        assert torch.equal(module.weight, weight * masks[name])
    assert {row.pattern for row in masks.report().rows} == {"2:4"}
