"""What checkpoint operations compute, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optx

BOTH: Any = pytest.mark.parametrize("scope", ["global", "tensor"])


def merged(
    method: optx.MergeMethod, *changes: dict[str, list[float]], dtype: torch.dtype = torch.float32
) -> Any:
    """What a merge makes of models that are these changes of zeros."""
    models = [{name: torch.tensor(t, dtype=dtype) for name, t in one.items()} for one in changes]
    made = optx.merge({name: torch.zeros_like(t) for name, t in models[0].items()}, models, method)
    assert isinstance(made, dict)
    return {name: t.tolist() for name, t in made.items()}


# ---- TIES ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_gives_entries_that_cancel_out_the_sign_elected_most_often(scope: Any, sign: float) -> None:
    """Entries of the whole model vote, not their sizes: a 9 does not outvote two -1s (the authors' code)."""
    ties = optx.TIES(density=1.0, scope=scope)
    one = {"a": [3.0, 9.0], "b": [-1.0, -2.0, -1.0]}
    two = {"a": [-3.0, 9.0], "b": [-1.0, 4.0, -1.0]}
    one, two = ({n: [sign * x for x in t] for n, t in m.items()} for m in (one, two))
    # -1, -1 and those of a: 9; -2 + 4 is a fourth vote, so there are two for each. Then plus.
    assert merged(ties, one, two)["a"] == [3.0, 9.0 * sign]
    one["b"].append(-sign)
    two["b"].append(0.0)
    assert merged(ties, one, two)["a"] == [-3.0 * sign, 9.0 * sign]
