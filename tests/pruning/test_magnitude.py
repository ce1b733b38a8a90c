"""Magnitude, and what all methods share: exact counts, patterns, and which of equals go."""

from __future__ import annotations

import pytest
import torch

import optx
from optx import OptxError


def test_exactly_as_many_go_and_of_equals_the_first() -> None:
    kept, new = optx.Magnitude(0.5).prune_matrix(torch.ones(3, 3))
    assert kept.flatten().tolist() == [False] * 4 + [True] * 5
    assert torch.equal(new, kept.float())


@pytest.mark.parametrize("pattern", ["2:2", "0:4", "4", "2:", "a:b", 24, "-1:4"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(OptxError, match="must be 'n:m' with 0 < n < m"):
        optx.Magnitude(pattern=pattern)
