"""Gumbel-softmax, score ratio and enumeration: which are unbiased, by how much they vary, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optx
from optx.policy import enumerated_loss, gumbel_weights, score_ratio_loss

LOGITS = [0.3, -0.5, 1.1, 0.0]
Q = [0.2, 1.3, -0.4, 0.9]
DRAWS = 100_000


def gradients(baseline: str) -> torch.Tensor:
    """Of the score-ratio loss for the logits, one row a draw."""
    w = torch.tensor(LOGITS, dtype=torch.float64).softmax(-1)
    drawn = torch.multinomial(w, DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor(LOGITS, dtype=torch.float64).expand(DRAWS, 4).clone().requires_grad_()
    scores = torch.tensor(Q, dtype=torch.float64).expand(DRAWS, 4)
    loss = score_ratio_loss(logits.log_softmax(-1), scores, drawn, baseline)  # type: ignore[arg-type]
    (DRAWS * loss).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("baseline", ["value", "none"])
def test_the_score_ratio_is_unbiased(baseline: str) -> None:
    """Property 7: its mean over 1e5 draws is the exact gradient, within three standard errors."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    enumerated_loss(logits.log_softmax(-1), -torch.tensor(Q, dtype=torch.float64)).backward()
    found = gradients(baseline)
    error = found.std(0) / math.sqrt(DRAWS)
    assert logits.grad is not None
    assert bool(((found.mean(0) - logits.grad).abs() < 3 * error).all())


def test_what_varies_how_much() -> None:
    """Of proposals that vary: freq less than the score ratio, and that less with a baseline than without."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.tensor(Q) + 0.3 * torch.randn(DRAWS, 4, generator=generator)
    drawn = torch.multinomial(torch.tensor(LOGITS).softmax(-1), DRAWS, replacement=True, generator=generator)
    spread: dict[str, float] = {}
    for kind in ("freq", "value", "none"):
        logits = torch.tensor(LOGITS).expand(DRAWS, 4).clone().requires_grad_()
        if kind == "freq":
            loss = optx.FrequencyLoss("sum_k")(logits.softmax(-1), scores)
        else:
            loss = score_ratio_loss(logits.log_softmax(-1), scores, drawn, kind)  # type: ignore[arg-type]
        (DRAWS * loss).backward()
        assert logits.grad is not None
        spread[kind] = float(logits.grad.var(0).sum() / logits.grad.mean(0).square().sum())
    assert spread["freq"] < spread["value"] < spread["none"]


def test_the_exact_sum_by_hand() -> None:
    log_w = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log()
    costs = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    by_hand = 0.5 * (0.2 * 1 + 0.8 * 2 + 0.5 * 3 - 0.5)
    assert float(enumerated_loss(log_w, costs)) == pytest.approx(by_hand)
    entropy = 0.5 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8) + math.log(0.5))
    assert float(enumerated_loss(log_w, costs, 0.7)) == pytest.approx(by_hand + 0.7 * entropy, rel=1e-5)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
    st.floats(0.05, 10),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_gumbel_softmax(
    batch: list[int], k: int, temperature: float, hard: bool, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, k, dtype=dtype, generator=generator, requires_grad=True)
    y = gumbel_weights(
        logits.log_softmax(-1), temperature, hard=hard, generator=torch.Generator().manual_seed(seed)
    )
    assert y.shape == (*batch, k)
    assert y.dtype == dtype
    torch.testing.assert_close(y.sum(-1), torch.ones(batch, dtype=dtype))
    soft = gumbel_weights(logits.log_softmax(-1), temperature, generator=torch.Generator().manual_seed(seed))
    values = torch.randn(y.shape, dtype=dtype, generator=generator)
    own = torch.autograd.grad((y * values).sum(), logits)[0]
    smooth = torch.autograd.grad((soft * values).sum(), logits)[0]
    torch.testing.assert_close(own, smooth)
    if hard:
        assert torch.equal(y, torch.nn.functional.one_hot(soft.argmax(-1), k).to(dtype))
    else:
        assert torch.equal(y, soft)


def test_gumbel_draws_are_of_w_at_any_temperature() -> None:
    w = torch.tensor(LOGITS).softmax(-1)
    for temperature in (0.1, 1.0, 5.0):
        y = gumbel_weights(
            w.log().expand(DRAWS, 4), temperature, hard=True, generator=torch.Generator().manual_seed(2)
        )
        torch.testing.assert_close(y.mean(0), w, atol=0.01, rtol=0)
    flat = gumbel_weights(w.log().expand(DRAWS, 4), 100.0, generator=torch.Generator().manual_seed(2))
    assert float((flat - 0.25).abs().max()) < 0.05


def test_gumbel_softmax_is_biased_where_the_score_ratio_is_not() -> None:
    """The mean gradient at temperature 1 of Q(sum_i y_i a_i), Q with two peaks that sums of actions miss."""
    actions, logits = torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.0])
    many = logits.expand(DRAWS, 2).clone().requires_grad_()
    y = gumbel_weights(many.log_softmax(-1), generator=torch.Generator().manual_seed(3))
    q = (y * actions).sum(-1).square() * torch.tensor(1.0)  # equal at both peaks: the exact gradient is 0
    q.sum().backward()
    assert many.grad is not None
    mean, error = many.grad.mean(0), many.grad.std(0) / math.sqrt(DRAWS)
    assert bool((mean.abs() > 10 * error).all())


def test_what_makes_no_sense_is_said() -> None:
    log_w = torch.full((2, 3), 1 / 3).log()
    with pytest.raises(optx.OptxError, match="temperature is 0; it must be a finite number above 0"):
        gumbel_weights(log_w, 0)
    with pytest.raises(optx.OptxError, match="baseline is 'mean'; it must be one of 'value', 'none'"):
        score_ratio_loss(log_w, log_w, torch.zeros(2, dtype=torch.int64), "mean")  # type: ignore[arg-type]
    with pytest.raises(optx.ShapeError, match=r"primitive is torch.int64 of shape \(2, 1\)"):
        score_ratio_loss(log_w, log_w, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(optx.ShapeError, match=r"primitive is torch\.float32"):
        score_ratio_loss(log_w, log_w, torch.zeros(2))
    with pytest.raises(optx.ShapeError, match=r"log_w has shape \(2, 3\) and what it weighs \(2, 2\)"):
        enumerated_loss(log_w, torch.zeros(2, 2))
    with pytest.raises(optx.OptxError, match=r"log_w has 0\.33"):
        enumerated_loss(log_w.exp(), log_w)
