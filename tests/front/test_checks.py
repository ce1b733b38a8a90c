"""The checks that all methods share: whatever is given, it is accepted or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optx
from optx._errors import check_choice, check_range, check_whole

CHECKS: dict[str, Callable[[Any], None]] = {
    "range": lambda value: check_range("It", "option", value, 0.0, 1.0),
    "whole": lambda value: check_whole("It", "option", value, 0),
    "choice": lambda value: check_choice("It", "option", value, (True, False)),
    "hashed choice": lambda value: check_choice("It", "option", value, frozenset({"a", "b"})),
}
ODD: dict[str, Any] = {
    "array": np.array([1, 0]),
    "array of one": np.array([1]),
    "no array": np.array([]),
    "large array": np.ones((50, 50)),
    "array of objects": np.array([None, object()]),
    "tensor": torch.tensor([1.0, 0.0]),
    "tensor of one": torch.tensor([1.0]),
    "meta tensor": torch.empty((), device="meta"),
    "list": [1],
    "dict": {"a": 1},
    "NaN": np.float32("nan"),
    "complex": 1j,
    "NumPy's string": np.str_("c"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_single_value_is_refused_in_one_sentence(check: str, odd: str) -> None:
    with pytest.raises(optx.OptxError, match=r"^It: option is [^\n]{1,110}; it must be [^\n]*\.$"):
        CHECKS[check](ODD[odd])


@pytest.mark.parametrize(
    ("check", "good"),
    [
        ("range", [0, 0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)]),
        ("whole", [0, np.int64(3)]),
        ("choice", [True, np.True_, np.array(True), torch.tensor(False)]),
        ("hashed choice", ["a", np.str_("b")]),
    ],
)
def test_single_values_of_any_library_are_accepted(check: str, good: list[Any]) -> None:
    for value in good:
        CHECKS[check](value)
