"""The frequency loss: the spec's numbers, its law, its fixed point, ties and nan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optx

W = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]
SCORES = [[1.0, 5.0, 2.0, 3.0], [0.0, -1.0, -2.0, -3.0]]


def test_the_numbers_of_the_spec() -> None:
    logits = torch.tensor(W, dtype=torch.float64).log().requires_grad_()
    loss = optx.FrequencyLoss()(logits.softmax(-1), torch.tensor(SCORES))
    loss.backward()
    assert loss.item() == pytest.approx(0.1275, abs=1e-12)
    wanted = [[0, -0.045, 0.015, 0.030], [-0.021, 0.007, 0.007, 0.007]]
    torch.testing.assert_close(logits.grad, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.sampled_from(["mean", "sum_k"]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_value_and_gradient(batch: list[int], k: int, seed: int, reduction: str, dtype: torch.dtype) -> None:
    """The gradient by the spec's formula for logits, the value by loops."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    scores = torch.randn(*batch, k, generator=generator)
    w = logits.softmax(-1)
    w.retain_grad()
    loss = optx.FrequencyLoss(reduction)(w, scores)  # type: ignore[arg-type]
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = w.detach().double().reshape(-1, k)
    total, by_w = 0.0, torch.zeros_like(rows)
    states = len(rows)
    for b, row in enumerate(scores.reshape(-1, k)):
        winner = max(range(k), key=lambda i: float(row[i]))
        for i in range(k):
            gap = float(rows[b, i]) - (i == winner)
            share = states * (k if reduction == "mean" else 1)
            total += gap**2 / share
            by_w[b, i] = 2 * gap / share
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    assert loss.item() == pytest.approx(total, abs=1e-5 if dtype != torch.float64 else 1e-12)
    assert w.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(w.grad.double().reshape(-1, k), by_w, **tolerance)
    by_logits = rows * (by_w - (rows * by_w).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad.double().reshape(-1, k), by_logits, **tolerance)


def test_w_becomes_the_frequency() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer, loss = torch.optim.SGD([logits], lr=8.0), optx.FrequencyLoss()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))
    winners = torch.multinomial(p, 1500 * 256, replacement=True, generator=generator).view(1500, 256)
    for row in torch.nn.functional.one_hot(winners, 4).float():
        optimizer.zero_grad()
        loss(logits.softmax(-1).expand(256, 4), row).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(logits.detach().softmax(-1), p, atol=0.01, rtol=0)


def test_of_equal_scores_the_lowest_number_is_the_best() -> None:
    w = torch.full((3, 4), 0.25, requires_grad=True)
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 1.0], [-torch.inf] * 4])
    optx.FrequencyLoss()(w, scores).backward()
    assert w.grad is not None
    assert (w.grad < 0).int().argmax(-1).tolist() == [0, 1, 0]
    assert (w.grad < 0).sum().item() == 3


def test_scores_are_constants_and_one_primitive_has_no_loss() -> None:
    scores = torch.randn(5, 3, requires_grad=True)
    w = torch.randn(5, 3, requires_grad=True)
    optx.FrequencyLoss()(w.softmax(-1), scores).backward()
    assert scores.grad is None
    one = torch.randn(5, 1, requires_grad=True)
    loss = optx.FrequencyLoss()(one.softmax(-1), torch.randn(5, 1))
    loss.backward()
    assert loss.item() == 0
    assert not one.grad.any()  # type: ignore[union-attr]


def test_under_autocast() -> None:
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    plain = optx.FrequencyLoss()(logits.softmax(-1), scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optx.FrequencyLoss()(logits.softmax(-1), scores), plain)


def test_what_makes_no_sense_is_said() -> None:
    w = torch.full((2, 3), 1 / 3)
    with pytest.raises(optx.OptxError, match=r"scores\[1, 2\] is nan, so no primitive is the best"):
        optx.FrequencyLoss()(w, torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]]))
    with pytest.raises(optx.ShapeError, match=r"w has shape \(2, 3\) and scores \(2, 4\)"):
        optx.FrequencyLoss()(w, torch.zeros(2, 4))
    with pytest.raises(optx.OptxError, match="reduction is 'sum'; it must be one of 'mean', 'sum_k'"):
        optx.FrequencyLoss("sum")  # type: ignore[arg-type]
    assert repr(optx.FrequencyLoss("sum_k")) == "FrequencyLoss(reduction='sum_k')"
