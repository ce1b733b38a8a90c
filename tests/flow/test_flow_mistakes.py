"""What a flow and its guide are given wrongly: told, where tokens of 0 or an ignored option came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

FLOW = optx.GumbelFlow(4)
TOKENS = torch.tensor([[0, 1, 2], [3, 2, 1]])


def even(x: Tensor, t: Tensor, *condition: Any) -> Tensor:
    return torch.zeros_like(x)


def share(sequences: Tensor) -> Tensor:
    return sequences[..., 2].mean(-1)


def sample(model: Any = even, form: str = "flow", **options: Any) -> Tensor:
    return optx.GumbelFlow(4, form=form).sample(model, (2, 3), 20, **options)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sample(lambda x, t: x * math.nan), "the model's logits are nan, or infinite, on the way to"),
        (lambda: sample(lambda x, t: x * 0 - math.inf), "the model's logits are nan, or infinite"),
        (
            lambda: sample(lambda x, t: x * (math.nan if t[0] == 1 else 1), decode="posterior"),
            "the model's logits are nan, or infinite, on the way to t = 1",
        ),
        (lambda: sample(lambda x, t: x * math.nan, "score"), "the model's logits are nan"),
        (lambda: sample(guide=lambda x, p, draws: x * math.nan), "the guide's velocity is nan on the way to"),
        (lambda: sample(guide=optx.STGuide(lambda s: share(s) * math.nan)), "the guide's velocity is nan"),
        (
            lambda: sample(guide=lambda x, p, draws: x[0]),
            r"of shape \(3, 4\); it must be \(2, 3, 4\)",
        ),
        (lambda: sample(guide=nn.Linear(4, 1)), r"guide is a Linear; .*optx\.STGuide\(classifier\)"),
        (
            lambda: sample(guide=optx.STGuide(lambda s: 5 * share(s) + 2, log_prob=True)),
            r"log_prob=True takes the log of probabilities; the classifier gave",
        ),
        (lambda: sample(null=1), "null= stands for a condition, and condition= is not given"),
        (lambda: sample(langevin=0.5), r"langevin=0\.5 is of form='score'"),
        (lambda: sample(form="score", solver="exponential"), "solver='exponential' is of form='flow'"),
        (
            lambda: sample(condition=torch.zeros(2), null=0, guidance_scale=math.inf),
            "guidance_scale is inf; it must be between",
        ),
        (lambda: sample(condition=[1, 2]), "condition is a list; it must be a tensor"),
        (lambda: sample(given=[[0] * 3] * 2, keep=torch.ones(2, 3).bool()), "given is a list"),
        (lambda: sample(generator=3), r"generator is 3; it must be a torch\.Generator, or a list"),
        (lambda: sample(progress=None), "progress is a NoneType; it must be True, False, or what wraps"),
        (lambda: FLOW.loss(even, TOKENS, weights=[1.0, 1.0]), "weights is a list; it must be a tensor"),
        (
            lambda: FLOW.loss(even, TOKENS, weights=-torch.ones(2)),
            r"weights has -1\.0; they must be at",
        ),
        (lambda: FLOW.loss(even, TOKENS, weights=torch.full((2,), math.nan)), "weights has nan"),
        (lambda: optx.GumbelFlow(4, tau_max=1e-38), r"tau_max=1e-38, decay=3\.0 and beta=2\.0 make"),
        (lambda: optx.GumbelFlow(4, beta=1e38), r"beta=1e\+38 make numbers that float32 does not hold"),
        (lambda: optx.GumbelFlow(4, invalid=1.5), r"invalid is 1\.5; it must be numbers of tokens"),
        (lambda: optx.GumbelFlow(4, invalid=None), "invalid is None; it must be numbers of tokens"),
    ],
)
def test_a_mistake_is_one_sentence(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        call()


def test_nan_where_there_is_padding_is_no_mistake() -> None:
    """Attention of a row of padding alone is nan."""
    mask = torch.tensor([[True, True, False], [False, False, False]])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x * 2).masked_fill(~mask[..., None], torch.nan)

    for options in ({}, {"solver": "exponential"}, {"decode": "posterior"}, {"form": "score"}):
        ids = sample(model, mask=mask, **options)
        assert torch.equal(ids == -100, ~mask)
