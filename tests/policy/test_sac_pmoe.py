"""SAC's losses: one primitive is plain SAC bit for bit, gradients go where they should, what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pmoe_policies import Q, policy, states
from torch import Tensor, nn

import optx
from optx.policy import least_q

ESTIMATORS = ("freq", "gumbel", "score", "enumerate")


def twins(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Q, Q]:
    torch.manual_seed(seed)
    return Q().to(dtype), Q().to(dtype)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---- one primitive --------------------------------------------------------------------------------------


class PlainSAC:
    """SAC as it is written everywhere, with the stable form of tanh's correction; nothing of optx."""

    def __init__(self, trunk: nn.Module, mean: nn.Linear, log_std: nn.Linear, q1: Q, q2: Q) -> None:
        self.trunk, self.mean, self.log_std, self.q1, self.q2 = trunk, mean, log_std, q1, q2
        self.target1, self.target2 = copy.deepcopy(q1), copy.deepcopy(q2)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.actor = torch.optim.Adam(
            [*trunk.parameters(), *mean.parameters(), *log_std.parameters()], lr=1e-2
        )
        self.critic = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-2)
        self.temperature = torch.optim.Adam([self.log_alpha], lr=1e-2)

    def act(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(s)
        mean, log_std = self.mean(h), self.log_std(h).clamp(-20, 2)
        noise = torch.randn(mean.shape)
        u = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise * noise - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return u.tanh(), log_prob - (2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, done: Tensor) -> None:
        new, log_prob = self.act(s)
        q = torch.minimum(self.q1(s, new), self.q2(s, new)).squeeze(-1)
        of_alpha = -(self.log_alpha * (log_prob.detach() - new.shape[-1]).mean())
        self.temperature.zero_grad()
        of_alpha.backward()
        self.temperature.step()
        alpha = self.log_alpha.detach().exp()
        of_policy = (alpha * log_prob - q).mean()
        with torch.no_grad():
            nxt, next_log_prob = self.act(s2)
            least = torch.minimum(self.target1(s2, nxt), self.target2(s2, nxt)).squeeze(-1)
            y = r + (1 - done) * 0.99 * (least - alpha * next_log_prob)
        self.actor.zero_grad()
        of_policy.backward()
        self.critic.zero_grad()
        errors = [(q(s, a).squeeze(-1) - y).square().mean() for q in (self.q1, self.q2)]
        (errors[0] + errors[1]).backward()
        self.critic.step()
        self.actor.step()
        with torch.no_grad():
            for net, target in ((self.q1, self.target1), (self.q2, self.target2)):
                for p, t in zip(net.parameters(), target.parameters(), strict=True):
                    t.lerp_(p, 0.005)


def batches(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(9)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        (numbers(32, 3), numbers(32, 2).tanh(), numbers(32), numbers(32, 3), (numbers(32) > 1).float())
        for _ in range(count)
    ]


def as_plain(model: Any, q1: Q, q2: Q) -> PlainSAC:
    part = model.out.optx.pmoe_head
    mean, log_std = nn.Linear(8, 2), nn.Linear(8, 2)
    with torch.no_grad():
        for name, one in (("mean", mean), ("log_std", log_std)):
            one.weight.copy_(getattr(part, f"{name}_weight"))
            one.bias.copy_(getattr(part, f"{name}_bias"))
    return PlainSAC(copy.deepcopy(model.trunk), mean, log_std, copy.deepcopy(q1), copy.deepcopy(q2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_one_primitive_it_is_plain_sac_bit_for_bit(estimator: Any) -> None:
    model, _ = policy(k=1)
    q1, q2 = twins()
    plain = as_plain(model, q1, q2)
    target1, target2 = copy.deepcopy(q1), copy.deepcopy(q2)
    log_alpha = torch.zeros((), requires_grad=True)
    actor = torch.optim.Adam(model.parameters(), lr=1e-2)
    critic = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-2)
    temperature = torch.optim.Adam([log_alpha], lr=1e-2)
    for number, (s, a, r, s2, done) in enumerate(batches(5)):
        torch.manual_seed(number)
        plain.step(s, a, r, s2, done)
        torch.manual_seed(number)
        losses = optx.sac_pmoe_losses(
            model(s),
            least_q(s, q1, q2),
            log_alpha=log_alpha,
            alpha_optimizer=temperature,
            estimator=estimator,
            generator=torch.default_generator if estimator != "gumbel" else None,
        )
        assert losses.freq.item() == 0
        if estimator == "gumbel":  # its own noise, of no effect on one primitive, has moved the generator on
            torch.manual_seed(number)
            torch.randn(32, 2)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            y = optx.sac_pmoe_target(model(s2), least_q(s2, target1, target2), alpha, r, done)
        actor.zero_grad()
        (losses.policy + losses.freq).backward()
        critic.zero_grad()
        sum((q(s, a).squeeze(-1) - y).square().mean() for q in (q1, q2)).backward()
        critic.step()
        actor.step()
        with torch.no_grad():
            for net, target in ((q1, target1), (q2, target2)):
                for p, t in zip(net.parameters(), target.parameters(), strict=True):
                    t.lerp_(p, 0.005)
    assert torch.equal(log_alpha, plain.log_alpha)
    for one, other in ((q1, plain.q1), (q2, plain.q2), (target1, plain.target1), (model.trunk, plain.trunk)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    part = model.out.optx.pmoe_head
    assert torch.equal(part.mean_weight, plain.mean.weight)
    assert torch.equal(part.log_std_bias, plain.log_std.bias)


# ---- where gradients go ---------------------------------------------------------------------------------


def test_the_frequency_loss_stays_in_the_mixing_head_and_the_policys_out_of_it() -> None:
    model, _ = policy()
    s = states()
    losses = optx.sac_pmoe_losses(model(s), least_q(s, *twins()), alpha=0.1)
    losses.freq.backward(retain_graph=True)
    assert set(grads(model)) == {"out.optx.pmoe_head.mixing_weight", "out.optx.pmoe_head.mixing_bias"}
    model.zero_grad()
    losses.policy.backward()
    assert not any("mixing" in name for name in grads(model))
    assert "trunk.0.weight" in grads(model)
    joined, _ = policy(detach=False)
    optx.sac_pmoe_losses(joined(s), least_q(s, *twins()), alpha=0.1).freq.backward()
    assert "trunk.0.weight" in grads(joined)


def test_only_the_best_primitive_learns() -> None:
    model, _ = policy()
    s, q_fn = states(), least_q(states(), *twins())
    mixture = model(s)
    for tensor in (mixture.means, mixture.log_stds):
        tensor.retain_grad()
    losses = optx.sac_pmoe_losses(mixture, q_fn, alpha=0.1, generator=torch.Generator().manual_seed(3))
    proposals = mixture.rsample_all(torch.Generator().manual_seed(3))
    best = q_fn(proposals.actions).argmax(-1)
    assert len(best.unique()) > 1
    losses.policy.backward()
    rows = torch.arange(len(s))
    for tensor in (mixture.means, mixture.log_stds):
        moved = (tensor.grad != 0).any(-1)
        assert bool(moved[rows, best].all())
        assert int(moved.sum()) == len(s)
    by_hand = (0.1 * proposals.log_probs - q_fn(proposals.actions))[rows, best].mean()
    assert losses.policy.item() == by_hand.item()
    wanted = optx.FrequencyLoss()(mixture.w, q_fn(proposals.actions))
    assert losses.freq.item() == wanted.item()


def test_back_propagate_all_and_the_score_with_entropy() -> None:
    model, _ = policy()
    s, q_fn = states(), least_q(states(), *twins())

    def losses(**options: Any) -> Any:
        return optx.sac_pmoe_losses(
            model(s), q_fn, alpha=0.5, generator=torch.Generator().manual_seed(3), **options
        )

    actions, log_probs = model(s).rsample_all(torch.Generator().manual_seed(3))
    q = q_fn(actions)
    assert losses(backprop="all").policy.item() == pytest.approx((0.5 * log_probs - q).sum(-1).mean().item())
    scores = q - 0.5 * log_probs
    assert not torch.equal(scores.argmax(-1), q.argmax(-1))
    found = losses(score="q-alpha_logp")
    assert found.freq.item() == pytest.approx(optx.FrequencyLoss()(model(s).w, scores).item())
    assert found.policy.item() == pytest.approx(-scores.max(-1).values.mean().item())
    assert losses(reduction="sum_k").freq.item() == pytest.approx(4 * losses().freq.item())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=10)
@given(
    k=st.integers(1, 5),
    count=st.integers(1, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    alpha=st.floats(0, 2),
    bounds=st.sampled_from([None, (-2.0, 3.0)]),
)
def test_every_estimator_at_all_sizes(
    estimator: Any, k: int, count: int, seed: int, dtype: torch.dtype, alpha: float, bounds: Any
) -> None:
    more = {} if bounds is None else dict(zip(("low", "high"), bounds, strict=True))
    model, handle = policy(seed, dtype, k=k, **more)
    s = states(count, dtype)
    losses = optx.sac_pmoe_losses(model(s), least_q(s, *twins(seed, dtype)), alpha, estimator=estimator)
    assert all(one.shape == () and one.dtype == dtype and bool(one.isfinite()) for one in losses)
    assert losses.alpha == 0
    (losses.policy + losses.freq).backward()
    assert all(bool(g.isfinite().all()) for g in grads(model).values())
    assert {name for name, _ in handle.named_parameters()} <= set(grads(model))


def test_enumerate_is_what_the_score_ratio_is_on_average() -> None:
    """With entropy too, of the mixing head; of many draws on the same states."""
    model, _ = policy()
    one, q_fn = states(1), least_q(states(1), *twins())
    mixture = model(one)
    proposals = mixture.rsample_all(torch.Generator().manual_seed(0))
    log_w = mixture.log_w.detach().requires_grad_()
    from optx.policy._estimates import Enumerated, ScoreRatio

    q = q_fn(proposals.actions)
    Enumerated(q.detach(), proposals.log_probs.detach(), log_w.log_softmax(-1)).policy(0.3).backward()
    exact = log_w.grad
    many = 40_000
    wide = log_w.detach().expand(many, 4).clone().requires_grad_()
    drawn = torch.multinomial(wide.detach().exp(), 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    estimate = ScoreRatio(
        q.detach().expand(many, 4),
        proposals.log_probs.detach().expand(many, 4),
        wide.log_softmax(-1),
        drawn,
        "value",
    )
    (many * estimate.freq(0.3)).backward()
    assert wide.grad is not None
    error = wide.grad.std(0) / math.sqrt(many)
    assert bool(((wide.grad.mean(0) - exact).abs() < 4 * error).all())


# ---- temperature and target -----------------------------------------------------------------------------


def test_the_temperature_by_hand_and_the_entropy_in_the_actions_units() -> None:
    for bounds, scale in (({}, 0.0), ({"low": -2.0, "high": (2.0, 4.0)}, math.log(2.0) + math.log(3.0))):
        model, _ = policy(**bounds)
        s, log_alpha = states(), torch.tensor([0.3], requires_grad=True)
        q_fn = least_q(s, *twins())
        losses = optx.sac_pmoe_losses(
            model(s), q_fn, log_alpha=log_alpha, generator=torch.Generator().manual_seed(2)
        )
        actions, log_probs = model(s).rsample_all(torch.Generator().manual_seed(2))
        best = q_fn(actions).argmax(-1, keepdim=True)
        gap = log_probs.gather(-1, best).mean() - 2 + scale
        assert losses.alpha.item() == pytest.approx(-0.3 * gap.item(), rel=1e-5)
        losses.alpha.backward()
        assert log_alpha.grad is not None
        assert float(log_alpha.grad) == pytest.approx(-gap.item(), rel=1e-5)
        assert not grads(model)
    given = optx.sac_pmoe_losses(
        model(s), q_fn, log_alpha=log_alpha, target_entropy=-7.0, generator=torch.Generator().manual_seed(2)
    )
    assert given.alpha.item() == pytest.approx(-0.3 * (gap + 2 - scale - 7).item(), rel=1e-5)


def test_the_target_by_hand() -> None:
    model, _ = policy()
    s, critics = states(), twins()
    reward, ended = torch.arange(16.0), torch.arange(16) % 2 == 0
    y = optx.sac_pmoe_target(
        model(s), least_q(s, *critics), 0.2, reward, ended, 0.9, torch.Generator().manual_seed(4)
    )
    drawn = model(s).rsample(torch.Generator().manual_seed(4))
    q = torch.minimum(*(critic(s, drawn.action).squeeze(-1) for critic in critics))
    wanted = reward + (~ended) * 0.9 * (q - 0.2 * drawn.log_prob)
    torch.testing.assert_close(y, wanted)
    assert not y.requires_grad
    assert torch.equal(y[ended], reward[ended])


def test_several_axes_of_states() -> None:
    model, _ = policy()
    s = states(12).view(2, 6, 3)
    losses = optx.sac_pmoe_losses(
        model(s), least_q(s, *twins()), alpha=0.1, generator=torch.Generator().manual_seed(0)
    )
    flat = s.view(12, 3)
    same = optx.sac_pmoe_losses(
        model(flat), least_q(flat, *twins()), alpha=0.1, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(losses, same)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_graph_has_all_of_a_loss(estimator: Any) -> None:
    """torch.compile goes through draws, checks and critics without a break."""
    model, _ = policy(low=-2.0)
    s, critics = states(), twins()

    def losses(s: Tensor) -> Any:
        return optx.sac_pmoe_losses(model(s), least_q(s, *critics), 0.1, estimator=estimator)

    def target(s: Tensor) -> Tensor:
        nothing = torch.zeros(len(s))
        y = optx.sac_pmoe_target(model(s), least_q(s, *critics), 0.1, nothing, nothing)
        return y + model(s).sample()[:, 0]

    torch._dynamo.reset()
    for one in (losses, target):
        torch.manual_seed(0)
        plain = one(s)
        torch.manual_seed(0)
        torch.testing.assert_close(torch.compile(one, fullgraph=True, backend="eager")(s), plain)


# ---- what is refused ------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_said() -> None:
    model, _ = policy()
    s = states()
    mixture, q_fn = model(s), least_q(s, *twins())
    log_alpha = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([log_alpha], lr=0.1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "alpha and log_alpha are one temperature, and neither is given"),
        ({"alpha": 0.1, "log_alpha": log_alpha}, "and both is given"),
        ({"alpha": -0.1}, r"alpha is -0\.1; it must be a finite number of at least 0"),
        ({"alpha": log_alpha}, r"alpha has shape \(\) and requires_grad=True"),
        ({"alpha": 0.1, "alpha_optimizer": optimizer}, "alpha_optimizer trains log_alpha="),
        ({"log_alpha": torch.zeros(2, requires_grad=True)}, r"log_alpha has shape \(2,\)"),
        ({"log_alpha": torch.zeros(())}, "requires_grad=False; it must be one number that is trained"),
        ({"alpha": 0.1, "estimator": "best"}, "estimator is 'best'; it must be one of 'freq', 'gumbel'"),
        (
            {"alpha": 0.1, "estimator": "gumbel", "score": "q-alpha_logp"},
            "score='q-alpha_logp' is of estimator=",
        ),
        ({"alpha": 0.1, "temperature": 0.5}, r"temperature=0\.5 is of estimator='gumbel'; estimator='freq'"),
        ({"alpha": 0.1, "hard": True}, "hard=True is of estimator='gumbel'"),
        ({"alpha": 0.1, "baseline": "none"}, "baseline='none' is of estimator='score'"),
        ({"alpha": 0.1, "estimator": "score", "backprop": "all"}, "backprop='all' is of estimator='freq'"),
        ({"alpha": 0.1, "score": "value"}, "score is 'value'; it must be one of 'q', 'q-alpha_logp'"),
        ({"alpha": 0.1, "reduction": "sum"}, "reduction is 'sum'"),
        ({"alpha": 0.1, "backprop": "best"}, "backprop is 'best'"),
    ]
    for options, says in wrong:
        with pytest.raises(optx.OptxError, match=says):
            optx.sac_pmoe_losses(mixture, q_fn, **options)
    with pytest.raises(optx.ShapeError, match=r"q_fn gave values of shape \(16, 2\) for actions of"):
        optx.sac_pmoe_losses(mixture, lambda a: a[:, 0], alpha=0.1)
    with pytest.raises(optx.OptxError, match="q_fn's values have no gradient to the actions"):
        optx.sac_pmoe_losses(mixture, lambda a: q_fn(a).detach(), alpha=0.1)
    with pytest.raises(optx.OptxError, match=r"sac_pmoe_losses: scores\[0, 0\] is nan"):
        optx.sac_pmoe_losses(mixture, lambda a: q_fn(a) * torch.nan, alpha=0.1)
    for reward, ended, says in (
        (torch.zeros(16, 1), torch.zeros(16), r"reward has shape \(16, 1\); it must be \(16,\)"),
        (torch.zeros(16), torch.zeros(16, 1), r"terminated has shape \(16, 1\)"),
    ):
        with pytest.raises(optx.ShapeError, match=says):
            optx.sac_pmoe_target(mixture, q_fn, 0.1, reward, ended)
    with pytest.raises(optx.OptxError, match=r"gamma is 1\.5; it must be between 0 and 1"):
        optx.sac_pmoe_target(mixture, q_fn, 0.1, torch.zeros(16), torch.zeros(16), gamma=1.5)
    with pytest.raises(optx.OptxError, match="least_q: there is no critic"):
        least_q(s)
