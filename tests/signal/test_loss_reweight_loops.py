"""LossReweight in loops: bad samples, the spec's regression, autocast, accumulation, compile, the Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

pytestmark = pytest.mark.usefixtures("one_thread")


def net(outputs: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- samples whose loss is not finite ---------------------------------------------------------------------


def target_is_nan(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    target = rows(8, logits.shape[1])[: len(logits)].clone()
    target[bad] = torch.nan
    return rw((logits - target).square())


def logits_overflow(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    much = torch.zeros(len(logits), 1)
    much[bad] = torch.inf
    return rw.from_logits(logits + much, torch.arange(len(logits)) % logits.shape[1])


def tokens_overflow(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    scale = torch.ones(len(logits), 1, 1)
    scale[bad] = torch.inf
    tokens = logits.view(len(logits), 2, -1) * scale
    return rw.from_logits(tokens, torch.arange(2 * len(logits)).view(-1, 2) % tokens.shape[2])


def log_of_nothing(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    share = logits.softmax(1)[:, 0].clone()
    share[bad] = 0.0
    return rw(-share.log())


def mean_of_no_token(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    mask = torch.ones_like(logits)
    mask[bad] = 0
    return rw((logits.square() * mask).sum(1) / mask.sum(1))


Case = Callable[[Tensor, optx.LossReweight, list[int]], Tensor]
CASES: list[Case] = [target_is_nan, logits_overflow, tokens_overflow, log_of_nothing, mean_of_no_token]


def gradients(case: Case, rw: optx.LossReweight, kept: list[int] | None, bad: list[int]) -> list[Tensor]:
    model, x = net(), rows(8, 4)
    logits = model(x)
    case(logits if kept is None else logits[kept], rw, bad).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"strategy": "uniform"}, {"max_weight": 1.5}])
def test_a_bad_sample_is_left_out_of_the_models_gradients(case: Case, options: dict[str, Any]) -> None:
    """The last one is bad: the gradients are those of the other seven alone."""
    rw = optx.LossReweight(**options, skip_nonfinite=True)
    with pytest.warns(UserWarning, match="1 of 8 samples is not finite; left out, 1 so far"):
        got = gradients(case, rw, None, [7])
    reference = optx.LossReweight(**options)
    wanted = gradients(case, reference, list(range(7)), [])
    for a, b in zip(got, wanted, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert rw.last_weights is not None
    assert reference.last_mean is not None
    assert float(rw.last_weights[7]) == 0
    assert float(rw.last_weights.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(rw.last_mean, reference.last_mean)


@pytest.mark.parametrize("case", CASES)
def test_unless_asked_for_a_bad_sample_makes_the_loss_nan(case: Case) -> None:
    rw = optx.LossReweight()
    assert not bool(case(net()(rows(8, 4)), rw, [2]).isfinite())
    assert rw.skipped == 0


def test_bad_samples_are_counted_and_warned_of_at_powers_of_ten() -> None:
    rw = optx.LossReweight(skip_nonfinite=True)
    losses = torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    told: list[str] = []
    for _ in range(6):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert bool(rw(losses.clone().requires_grad_()).isfinite())
        told += [str(one.message) for one in found]
    assert told == [
        "LossReweight: the loss of 2 of 4 samples is not finite; left out, 2 so far.",
        "LossReweight: the loss of 2 of 4 samples is not finite; left out, 10 so far.",
    ]
    assert rw.skipped == rw.state_dict()["skipped"] == 12


def test_a_batch_of_bad_samples_has_no_loss_and_no_gradient() -> None:
    rw = optx.LossReweight(skip_nonfinite=True)
    with pytest.warns(UserWarning, match="8 of 8"):
        got = gradients(target_is_nan, rw, None, list(range(8)))
    assert all(bool((g == 0).all()) for g in got)


def test_where_activations_are_nan_gradients_say_so() -> None:
    """What can't be cut out is not hidden: a weight's gradient has the bad activation as a factor."""
    model, x = net(), rows(8, 4)
    x[7] = torch.nan
    with pytest.warns(UserWarning, match="1 of 8"):
        optx.LossReweight(skip_nonfinite=True)(model(x).square()).backward()
    assert not bool(model[0].weight.grad.isfinite().all())  # type: ignore[union-attr]
