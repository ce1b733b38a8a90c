"""`grpo_advantage`, `ppo_clip_loss` and `k3_divergence` against worked figures and plain loops."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optx
from optx.functional import grpo_advantage, k3_divergence, ppo_clip_loss


def test_worked_advantages() -> None:
    found = grpo_advantage(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64), 8)
    assert found[0].item() == pytest.approx(1.62018167, abs=6e-9)
    assert found[1].item() == pytest.approx(-0.54006056, abs=6e-9)


def test_groups_that_agree_have_none_and_one_sample_is_its_own() -> None:
    third = torch.full((7,), 1 / 3)
    assert torch.equal(grpo_advantage(third, 7), torch.zeros(7))
    assert torch.equal(grpo_advantage(torch.tensor([0.1] * 3 + [0.3] * 3), 3), torch.zeros(6))
    torch.testing.assert_close(grpo_advantage(torch.tensor([2, -1]), 1), torch.tensor([2.0, -1.0]))


@given(data=st.data())
def test_advantages_of_groups(data: st.DataObject) -> None:
    group, count = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 4))
    rewards = data.draw(st.lists(st.floats(-5, 5, width=32), min_size=group * count, max_size=group * count))
    found = grpo_advantage(torch.tensor(rewards, dtype=torch.float64), group).tolist()
    for start in range(0, len(rewards), group):
        some = rewards[start : start + group]
        spread = statistics.stdev(some) + 1e-6
        for one, was in zip(found[start : start + group], some, strict=True):
            assert one == pytest.approx((was - statistics.fmean(some)) / spread, rel=1e-6, abs=1e-6)


def test_worked_losses() -> None:
    ratio = torch.tensor([1.5, 0.5, 4.0, 1.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)
    found = ppo_clip_loss(ratio.log(), torch.zeros(4), advantages, reduction="none")
    torch.testing.assert_close(found, torch.tensor([-1.2, -0.5, 3.0, 1.1], dtype=torch.float64))
    divergence = k3_divergence(torch.zeros(2, dtype=torch.float64), torch.tensor([0.3, -0.2]).double())
    wanted = torch.tensor([0.04985881, 0.01873075], dtype=torch.float64)
    torch.testing.assert_close(divergence, wanted, rtol=0, atol=6e-9)


@given(data=st.data())
def test_losses_and_their_gradients(data: st.DataObject) -> None:
    """Against the two clips, case by case; the gradient is r A where the loss follows the ratio, else 0."""
    n = data.draw(st.integers(1, 12))
    clip = data.draw(st.sampled_from([0.0, 0.2, 0.5]))
    dual = data.draw(st.sampled_from([3.0, 1.5, None]))
    one = st.lists(st.floats(-2, 2), min_size=n, max_size=n)
    new, was, advantages = (torch.tensor(data.draw(one), dtype=torch.float64) for _ in range(3))
    new.requires_grad_()
    found = ppo_clip_loss(new, was, advantages, clip=clip, dual_clip=dual, reduction="none")
    (slope,) = torch.autograd.grad(found.sum(), new)
    for i in range(n):
        r, A = math.exp(float(new.detach()[i]) - float(was[i])), float(advantages[i])
        edge = 1 + clip if A > 0 else 1 - clip
        follows = r <= edge if A > 0 else r >= edge
        wanted = -r * A if follows else -edge * A
        if dual is not None and A < 0 and wanted > -dual * A:
            wanted, follows = -dual * A, False
        assert float(found.detach()[i]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        if min(abs(r - edge), abs(r - (dual or 0))) > 1e-6:
            assert float(slope[i]) == pytest.approx(-r * A if follows else 0.0, rel=1e-9, abs=1e-12)


def test_only_what_counts_is_in_the_mean() -> None:
    logp = torch.randn(2, 3, requires_grad=True)
    old = torch.tensor([[0.0, 0.0, torch.nan], [0.0, torch.inf, 0.0]])
    mask = old.isfinite()
    found = ppo_clip_loss(logp, old, torch.tensor([1.0, -1.0]), mask)
    by_step = ppo_clip_loss(logp, old, torch.tensor([1.0, -1.0]), mask, reduction="none")
    total = ppo_clip_loss(logp, old, torch.tensor([1.0, -1.0]), mask, reduction="sum")
    torch.testing.assert_close(found, by_step[mask].mean())
    torch.testing.assert_close(total, by_step[mask].sum())
    assert not by_step[~mask].any()
    wide = torch.tensor([[1.0] * 3, [-1.0] * 3])
    assert torch.equal(ppo_clip_loss(logp, old, wide, mask), found)


def test_far_ratios_stay_finite() -> None:
    logp = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = ppo_clip_loss(logp, torch.zeros(2), torch.tensor([-1.0, 0.0]))
    loss = loss + k3_divergence(logp, torch.zeros(2)).sum()
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: grpo_advantage(torch.zeros(7), 4), optx.OptxError, "7 rewards are no multiple of group=4"),
        (lambda: grpo_advantage(torch.zeros(2, 4), 4), optx.ShapeError, r"rewards have shape \(2, 4\)"),
        (lambda: grpo_advantage(torch.zeros(4), 0), optx.OptxError, "group is 0"),
        (
            lambda: grpo_advantage(torch.tensor([0.0, math.nan]), 2),
            optx.OptxError,
            r"rewards\[1\] is nan; all must be finite",
        ),
    ],
)
def test_mistaken_rewards(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"clip": 1.5}, optx.OptxError, "clip is 1.5; it must be between 0.0 and 1.0"),
        ({"dual_clip": 1.0}, optx.OptxError, "dual_clip is 1.0; it must be above 1, or None"),
        ({"reduction": "median"}, optx.OptxError, "reduction is 'median'"),
        ({"mask": torch.zeros(2, 3)}, optx.OptxError, "no step counts"),
        ({"mask": torch.ones(2)}, optx.ShapeError, r"mask has shape \(2,\)"),
        ({"advantages": torch.zeros(3)}, optx.ShapeError, r"advantages has shape \(3,\)"),
        ({"logp_old": torch.zeros(2, 1)}, optx.ShapeError, r"logp_old has shape \(2, 1\)"),
    ],
)
def test_mistaken_losses(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {"logp": torch.zeros(2, 3), "logp_old": torch.zeros(2, 3), "advantages": torch.zeros(2)}
    with pytest.raises(kind, match=message):
        ppo_clip_loss(**(good | options))
