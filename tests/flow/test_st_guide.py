"""STGuide: the spec's gradient, that it steers, leaves no trace, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx._errors import OptxError
from optx.flow._draws import Draws
from optx.flow.st_guide import through_softmax

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(rows: int, dtype: torch.dtype = F64) -> Draws:
    return Draws("test", seeded(), rows, dtype, torch.device("cpu"))


def test_the_gradient_of_the_spec() -> None:
    """At x̃ = e₃, by the guide itself: the third token is made certain to be drawn."""
    x = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=F64)
    w = torch.tensor([1, -2, 0.5, 3], dtype=F64)
    certain = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]], dtype=F64)
    seen: list[Tensor] = []

    def classifier(sequences: Tensor) -> Tensor:
        seen.append(torch.sigmoid((sequences * w).sum((1, 2))))
        return seen[-1]

    found = optx.STGuide(classifier, gamma=1.0, samples=3)(x, certain, draws(1))
    assert found is not None
    torch.testing.assert_close(seen[0].detach(), torch.full((3,), 0.6224593, dtype=F64), atol=5e-8, rtol=0)
    wanted = torch.tensor([-0.0011750, -0.1433523, -0.0387756, 0.1833029], dtype=F64)
    torch.testing.assert_close(found.flatten(), wanted, atol=5e-8, rtol=0)
    assert found.sum().abs() < 1e-15


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 5),
    vocab=st.integers(2, 6),
    samples=st.integers(1, 4),
    log_prob=st.booleans(),
    at=st.sampled_from(["posterior", "state"]),
    top_k=st.sampled_from([None, 1, 2]),
    gamma=st.sampled_from([-2.0, 0.5, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_it_is_the_straight_through_gradient_by_autograd(
    rows: int,
    length: int,
    vocab: int,
    samples: int,
    log_prob: bool,
    at: str,
    top_k: int | None,
    gamma: float,
    seed: int,
) -> None:
    """x = softmax(l); d/dl of the mean over samples of f(x̃ + x - sg(x)), for each row by itself."""
    random = seeded(seed)
    l = torch.randn(rows, length, vocab, generator=random, dtype=F64).requires_grad_()
    p = torch.randn(rows, length, vocab, generator=random, dtype=F64).softmax(-1)
    w = torch.randn(length, vocab, generator=random, dtype=F64)
    seen: list[Tensor] = []

    def classifier(sequences: Tensor) -> Tensor:
        seen.append(sequences.detach())
        return torch.sigmoid((sequences * w).sum((1, 2)))[:, None]

    guide = optx.STGuide(classifier, gamma, samples, log_prob=log_prob, at=at, top_k=top_k)
    x = l.softmax(-1)
    found = guide(x.detach(), p, draws(rows))
    assert found is not None
    drawn = seen[0].reshape(rows, samples, length, vocab)
    assert ((drawn == 0) | (drawn == 1)).all()
    assert (drawn.sum(-1) == 1).all()
    if top_k == 1:
        wanted = (x if at == "state" else p).argmax(-1)
        assert torch.equal(drawn.argmax(-1), wanted[:, None].expand(rows, samples, length))
    value = torch.sigmoid(((drawn + x[:, None] - x.detach()[:, None]) * w).sum((2, 3)))
    value = value.log() if log_prob else value
    (by_autograd,) = torch.autograd.grad(value.mean(1).sum(), l)
    torch.testing.assert_close(found, gamma * by_autograd, atol=1e-12, rtol=1e-9)
    assert found.sum(-1).abs().max() < 1e-12


def test_draws_are_of_the_distribution() -> None:
    guide = optx.STGuide(lambda x: x.sum((1, 2)), samples=5000)
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]]], dtype=F64)
    found = guide.drawn(p, draws(1)).mean(1)
    torch.testing.assert_close(found, p, atol=0.02, rtol=0)


@pytest.mark.parametrize("form", ["flow", "score"])
def test_no_strength_changes_no_bit_and_more_steers_more(form: str) -> None:
    flow, model = optx.GumbelFlow(4, form=form, noise="fixed"), Tiny(4)

    def sampled(gamma: float | None) -> Tensor:
        guide = None if gamma is None else optx.STGuide(lambda x: x[..., 1:3].sum(-1).mean(-1), gamma, 4)
        _, path = flow.sample(model, (64, 8), 30, guide=guide, generator=seeded(), return_path=True)
        return path

    plain = sampled(None)
    assert torch.equal(sampled(0.0), plain)
    shares = [sampled(gamma)[-1][..., 1:3].sum(-1).mean().item() for gamma in (-20.0, 0.0, 5.0, 20.0, 60.0)]
    assert shares == sorted(shares)
    assert shares[-1] - shares[1] > 0.1
    assert shares[1] - shares[0] > 0.03


def test_the_classifier_is_left_as_it_was() -> None:
    judge = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Sigmoid())
    judge.to(torch.bfloat16).train()
    seen: list[Any] = []
    judge[2].register_forward_hook(lambda m, args, out: seen.append((m.training, args[0].dtype)))
    flow, guide = optx.GumbelFlow(4), optx.STGuide(judge, 3.0, log_prob=True)
    with torch.inference_mode():
        ids = flow.sample(Tiny(4), (2, 5), 8, guide=guide, generator=seeded())
    assert ids.shape == (2, 5)
    assert seen == [(False, torch.bfloat16)] * 8
    assert judge[2].training
    assert all(p.grad is None for p in judge.parameters())


def test_padding_and_what_is_given_reach_the_classifier() -> None:
    flow, seen = optx.GumbelFlow(3), []

    def judge(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x[..., 0].sum(-1)

    mask, keep = torch.tensor([[True, True, True, False]]), torch.tensor([[False, True, False, False]])
    given = torch.tensor([[0, 2, 0, 0]])
    guide = optx.STGuide(judge, 1.0, samples=2)
    flow.sample(Tiny(3), (1, 4), 8, guide=guide, mask=mask, given=given, keep=keep)
    for one in seen:
        assert one[:, 3].abs().max() == 0
        assert torch.equal(one[:, 1], torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3))


def test_the_jacobian_keeps_the_simplex() -> None:
    x = torch.tensor([0.0, 0.25, 0.75], dtype=F64)
    found = through_softmax(x, torch.tensor([5.0, 1.0, -1.0], dtype=F64))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.375, -0.375], dtype=F64))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"classifier": 3}, "classifier is a int"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": "much"}, "gamma is 'much'"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"samples": 2.5}, r"samples is 2\.5; it must be a whole number"),
        ({"at": "x"}, "at is 'x'; it must be one of 'posterior', 'state'"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"log_prob": 2}, "log_prob is 2"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptxError, match=f"STGuide: {says}"):
        optx.STGuide(**{"classifier": lambda x: x} | options)


@pytest.mark.parametrize(
    ("classifier", "options", "says"),
    [
        (lambda x: x.argmax(-1).float().mean(-1), {}, "doesn't depend on its input by operations"),
        (lambda x: torch.ones(len(x), requires_grad=True), {}, "none that reaches its input"),
        (lambda x: x.mean(), {}, r"the classifier gave \(\) for 8 sequences; it must give one number"),
        (lambda x: x.mean(1), {}, r"the classifier gave \(8, 4\) for 8 sequences"),
        (lambda x: x.sum((1, 2)) - 9, {"log_prob": True}, r"log_prob=True takes .* gave -6"),
        (
            nn.Linear(5, 1),
            {},
            r"failed on one-hot sequences of shape \(8, 3, 4\).*the vocabulary of 4",
        ),
        (lambda x: x.mean((1, 2)), {"top_k": 5}, "top_k is 5; the vocabulary has 4 tokens"),
    ],
)
def test_classifiers_that_are_none(classifier: Any, options: dict[str, Any], says: str) -> None:
    guide = optx.STGuide(classifier, 1.0, samples=4, **options)
    with pytest.raises(OptxError, match=f"STGuide: .*{says}"):
        optx.GumbelFlow(4).sample(lambda x, t: x, (2, 3), 8, guide=guide)
