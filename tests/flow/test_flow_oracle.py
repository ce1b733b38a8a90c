"""Samplers with an exact model: which of them give the law back, and by how much the paper's does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import Oracle
from torch import Tensor

import optx

UNEVEN = torch.tensor([0.6, 0.3, 0.1])


def marginals(law: Tensor, rows: int = 5000, steps: int = 200, **options: Any) -> Tensor:
    sampling = {key: options.pop(key) for key in ("solver", "langevin") if key in options}
    flow = optx.GumbelFlow(len(law), **options)
    ids = flow.sample(
        Oracle(flow, law), (rows, 1), steps, generator=torch.Generator().manual_seed(0), **sampling
    )
    return torch.bincount(ids.flatten(), minlength=len(law)) / rows


@pytest.mark.parametrize(
    ("form", "noise", "options"),
    [
        ("flow", "fixed", {}),
        ("flow", "fixed", {"solver": "exponential", "steps": 50}),
        ("score", "fixed", {"steps": 100}),
        ("score", "sharpened", {"steps": 100}),
        ("score", "sharpened", {"langevin": 0.3, "steps": 60}),
    ],
)
def test_the_law_comes_back(form: str, noise: str, options: dict[str, Any]) -> None:
    found = marginals(UNEVEN, form=form, noise=noise, **options)
    torch.testing.assert_close(found, UNEVEN, atol=0.03, rtol=0)


def test_the_papers_path_gives_it_back_where_it_is_nearly_even() -> None:
    """The velocity does not move the path whose noise is sharpened: what is frequent grows more so."""
    even = torch.tensor([0.4, 0.35, 0.25])
    torch.testing.assert_close(marginals(even), even, atol=0.03, rtol=0)
    torch.testing.assert_close(marginals(UNEVEN), torch.tensor([0.69, 0.28, 0.03]), atol=0.02, rtol=0)


def test_a_sampler_that_ignored_the_model_would_be_seen() -> None:
    flow = optx.GumbelFlow(3, noise="fixed")
    ids = flow.sample(lambda x, t: torch.zeros_like(x), (4000, 1), 20)
    shares = torch.bincount(ids.flatten(), minlength=3) / 4000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_many_tokens() -> None:
    """Twenty tokens, Zipf's law, by the score and by the flow: the total variation."""
    law = 1 / torch.arange(1, 21).float()
    law = law / law.sum()
    for options in ({"solver": "exponential", "steps": 40}, {"form": "score", "steps": 50}):
        found = marginals(law, rows=1500, noise="fixed", **options)
        assert 0.5 * (found - law).abs().sum() < 0.06
