"""PPO's losses: by hand, one primitive as plain PPO, routing by advantages, and a bandit of two peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pmoe_policies import policy, states
from torch import Tensor, nn

import optx


def taken(model: Any, s: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Actions, their density, who acted, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mixture = model(s)
        action, _, primitive = mixture.rsample(generator)
        return action, mixture.log_prob(action), primitive, torch.randn(len(s), generator=generator)


def test_of_one_primitive_it_is_ppo() -> None:
    model, _ = policy(k=1, squash=False)
    s = states()
    actions, old, _, advantages = taken(model, s)
    old = old + 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    losses = optx.ppo_pmoe_losses(model(s), actions, old, advantages)
    mixture = model(s)
    plain = torch.distributions.Independent(
        torch.distributions.Normal(mixture.means[:, 0], mixture.log_stds[:, 0].exp()), 1
    )
    ratio = (plain.log_prob(actions) - old).exp()
    wanted = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    torch.testing.assert_close(losses.policy, wanted)
    assert losses.freq.item() == 0


@settings(max_examples=20)
@given(
    st.integers(2, 5),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 1000),
    st.floats(0.05, 0.5),
    st.booleans(),
)
def test_value_and_gradient(k: int, count: int, squash: bool, seed: int, clip: float, even: bool) -> None:
    """By loops over states; w is a constant in the ratio, and only positive advantages route."""
    model, _ = policy(seed, torch.float64, k=k, squash=squash)
    s = states(count, torch.float64)
    actions, old, primitive, advantages = taken(model, s, seed)
    old = old + 0.2
    mixture = model(s)
    losses = optx.ppo_pmoe_losses(
        mixture, actions, old, advantages, clip=clip, primitive=primitive, even=even
    )
    own, w = mixture.component_log_prob(actions).exp(), mixture.w.detach()
    total, votes = torch.zeros((), dtype=torch.float64), []
    for b in range(count):
        ratio = (w[b] * own[b]).sum() / old[b].exp()
        kept = ratio.clamp(1 - clip, 1 + clip)
        total = total - torch.minimum(ratio * advantages[b], kept * advantages[b]) / count
        if advantages[b] > 0:
            v = nn.functional.one_hot(primitive[b], k)
            weight = 1 / w[b, primitive[b]] if even else torch.ones((), dtype=torch.float64)
            votes.append(torch.stack([weight * (v - mixture.w[b]).square().mean(), weight]))
    torch.testing.assert_close(losses.policy, total)
    sums = torch.stack(votes).sum(0) if votes else torch.zeros(2, dtype=torch.float64)
    freq = sums[0] / sums[1] if votes else sums[0]
    torch.testing.assert_close(losses.freq, freq)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = list(named.values())
    by_hand = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(losses.policy, trained, allow_unused=True)
    for name, one, other in zip(named, found, by_hand, strict=True):
        assert (one is None) == (other is None) == ("mixing" in name)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_who_acted_is_guessed_from_the_action_and_scores_say_otherwise() -> None:
    model, _ = policy(log_std_max=-3.0)
    s = states()
    actions, old, primitive, advantages = taken(model, s)
    told = optx.ppo_pmoe_losses(model(s), actions, old, advantages, primitive=primitive)
    guessed = optx.ppo_pmoe_losses(model(s), actions, old, advantages)
    torch.testing.assert_close(told, guessed)
    scores = torch.randn(16, 4, generator=torch.Generator().manual_seed(8))
    scored = optx.ppo_pmoe_losses(model(s), actions, old, advantages, scores=scores)
    torch.testing.assert_close(scored.freq, optx.FrequencyLoss()(model(s).w, scores))
    nothing = optx.ppo_pmoe_losses(model(s), actions, old, -advantages.abs(), primitive=primitive)
    assert nothing.freq.item() == 0


def two_peaks(a: Tensor) -> Tensor:
    return sum(torch.exp(-((a[..., 0] - peak) ** 2) / (2 * 0.15**2)) for peak in (-0.6, 0.6))  # type: ignore


def bandit(seed: int) -> tuple[list[float], float]:
    """The weight at each peak after a short training, and the reward."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 2))
    handle = optx.attach(net, optx.PMOEHead(k=8, init=0.5), targets="0")
    optimizer = torch.optim.Adam(handle.parameters(), lr=3e-2)
    s = torch.ones(256, 1)
    for _ in range(60):
        with torch.no_grad():
            mixture = net(s)
            actions, _, primitive = mixture.rsample()
            old, reward = mixture.log_prob(actions), two_peaks(actions)
            advantages = (reward - reward.mean()) / (reward.std() + 1e-6)
        for _ in range(3):
            losses = optx.ppo_pmoe_losses(net(s), actions, old, advantages, primitive=primitive)
            optimizer.zero_grad()
            (losses.policy + losses.freq).backward()
            optimizer.step()
    with torch.no_grad():
        mixture = net(s)
        near = [(mixture.centres[0, :, 0] - peak).abs() < 0.1 for peak in (-0.6, 0.6)]
        return [mixture.w[0][one].sum().item() for one in near], two_peaks(mixture.sample()).mean().item()


def test_a_bandit_of_two_peaks(one_thread: None) -> None:
    """Both are found and stay in use, in most of three seeds: in 7 of 8 when it was tried."""
    found = [bandit(seed) for seed in (2, 3, 4)]
    assert sum(min(weights) > 0.1 for weights, _ in found) >= 2
    assert sorted(reward for _, reward in found)[1] > 0.9


def test_what_makes_no_sense_is_said() -> None:
    model, _ = policy()
    s = states()
    actions, old, primitive, advantages = taken(model, s)
    with pytest.raises(optx.OptxError, match="primitive and scores both say"):
        optx.ppo_pmoe_losses(
            model(s), actions, old, advantages, primitive=primitive, scores=torch.zeros(16, 4)
        )
    with pytest.raises(optx.OptxError, match="clip is 0; it must be a finite number above 0"):
        optx.ppo_pmoe_losses(model(s), actions, old, advantages, clip=0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"advantages": advantages[:, None]}, r"advantages has shape \(16, 1\); it must be \(16,\)"),
        ({"old_log_prob": old[:, None]}, r"old_log_prob has shape \(16, 1\)"),
        ({"scores": torch.zeros(16, 3)}, r"scores has shape \(16, 3\); it must be \(16, 4\)"),
        ({"primitive": primitive[:, None]}, r"primitive is torch\.int64 of shape \(16, 1\); it must be"),
        ({"primitive": primitive.float()}, r"primitive is torch\.float32"),
    ]
    for given_wrong, says in wrong:
        with pytest.raises(optx.ShapeError, match=says):
            optx.ppo_pmoe_losses(
                model(s), actions, **{"old_log_prob": old, "advantages": advantages, **given_wrong}
            )
    with pytest.raises(optx.OptxError, match="outside of the policy's bounds"):
        optx.ppo_pmoe_losses(model(s), 2 + actions, old, advantages)


def test_a_policy_that_went_far_has_numbers() -> None:
    """exp(200) is infinite; infinite times an advantage of 0, or backwards, is nan."""
    model, _ = policy()
    s = states()
    actions, old, primitive, advantages = taken(model, s)
    advantages[0] = 0
    losses = optx.ppo_pmoe_losses(model(s), actions, old - 200, advantages, primitive=primitive)
    (losses.policy + losses.freq).backward()
    assert losses.policy.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_of_a_primitive_that_is_all_but_gone_routing_has_numbers() -> None:
    """1 / w is infinite in float32 at ln w = -200; it counts all there is among those of weight 1."""
    logits = torch.tensor([[0.0, -200.0]]).expand(4, 2).clone().requires_grad_()
    mixture = optx.policy.ActionMixture(torch.zeros(4, 2, 1), torch.zeros(4, 2, 1), logits)
    actions = torch.zeros(4, 1)
    old, primitive = mixture.log_prob(actions).detach(), torch.tensor([0, 0, 1, 1])
    losses = optx.ppo_pmoe_losses(mixture, actions, old, torch.tensor([1.0, 1, 1, -1]), primitive=primitive)
    losses.freq.backward()
    assert losses.freq.item() == pytest.approx(1.0)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    even = optx.ppo_pmoe_losses(mixture, actions, old, torch.tensor([1.0, 1, -1, -1]), primitive=primitive)
    assert even.freq.item() == 0
