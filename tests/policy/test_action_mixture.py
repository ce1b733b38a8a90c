"""The mixture of squashed Gaussians: densities against torch.distributions, draws, bounds, entropy."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.utils import _pytree

import optx
from optx.policy import ActionMixture

DOUBLE = torch.float64


def drawn(
    *batch: int, k: int = 4, n: int = 2, seed: int = 0, dtype: torch.dtype = DOUBLE, **more: object
) -> ActionMixture:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=DOUBLE).to(dtype)

    return ActionMixture(numbers(k, n), 0.5 * numbers(k, n) - 0.5, numbers(k), **more)  # type: ignore[arg-type]


def by_torch(m: ActionMixture) -> TransformedDistribution:
    """The same distribution, out of torch's parts; its log_prob at values strictly inside."""
    gaussians = MixtureSameFamily(
        Categorical(logits=m.logits), Independent(Normal(m.means, m.log_stds.exp()), 1)
    )
    if not m.squash:
        return TransformedDistribution(gaussians, [])
    steps = [TanhTransform()]
    if m.low is not None and m.high is not None:
        steps.append(AffineTransform((m.high + m.low) / 2, (m.high - m.low) / 2, event_dim=1))
    return TransformedDistribution(gaussians, steps)


def test_the_numbers_of_the_spec() -> None:
    means, stds = torch.tensor([[-1.0], [2.0]], dtype=DOUBLE), torch.tensor([[0.5], [1.0]], dtype=DOUBLE)
    log_w = torch.tensor([0.3, 0.7], dtype=DOUBLE).log()
    plain = ActionMixture(means, stds.log(), log_w, squash=False)
    squashed = ActionMixture(means, stds.log(), log_w)
    a = torch.tensor([0.4], dtype=DOUBLE)
    assert plain.log_prob(a).item() == pytest.approx(-2.4962444, abs=5e-8)
    assert squashed.log_prob(a.tanh()).item() == pytest.approx(-2.3403374, abs=5e-8)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, DOUBLE]),
    st.sampled_from(["plain", "unit", "bounds"]),
)
def test_densities_are_torchs(
    batch: list[int], k: int, n: int, seed: int, dtype: torch.dtype, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = -3 * torch.rand(n, generator=generator, dtype=DOUBLE) - 0.1
    high = 2 * torch.rand(n, generator=generator, dtype=DOUBLE) + 0.1
    bounds = {"low": low.to(dtype), "high": high.to(dtype)} if kind == "bounds" else {}
    m = drawn(*batch, k=k, n=n, seed=seed, dtype=dtype, squash=kind != "plain", **bounds)
    a = m.sample(generator)
    assert a.shape == (*batch, n)
    assert a.dtype == m.log_prob(a).dtype == m.w.dtype == dtype
    if kind == "bounds":
        assert bool((a >= low.to(dtype) - 1e-6).all() and (a <= high.to(dtype) + 1e-6).all())
    if dtype == DOUBLE:
        torch.testing.assert_close(m.log_prob(a), by_torch(m).log_prob(a), rtol=1e-7, atol=1e-7)
    wide = drawn(
        *batch, k=k, n=n, seed=seed, squash=kind != "plain", **{x: y.double() for x, y in bounds.items()}
    )
    inside = m.centres[..., 0, :]  # not where atanh in float32 loses everything
    near = float(((inside - (0 if kind != "bounds" else (low + high) / 2)).abs()).max())
    if kind == "plain" or near < 0.9:
        torch.testing.assert_close(
            m.log_prob(inside).double(), wide.log_prob(inside.double()), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(m.w.sum(-1), torch.ones(batch, dtype=dtype))
    torch.testing.assert_close(m.log_w.exp(), m.w)


def test_it_integrates_to_one() -> None:
    for more in ({}, {"low": torch.tensor([-2.0]).double(), "high": torch.tensor([5.0]).double()}):
        m = drawn(k=3, n=1, **more)
        u = torch.linspace(-14, 14, 100_001, dtype=DOUBLE)
        scale = 1.0 if not more else 3.5
        a = (u.tanh() * scale + (0 if not more else 1.5)).clamp(-1 if not more else -2, 1 if not more else 5)
        slope = (1 - u.tanh().square()) * scale
        assert float(torch.trapezoid(m.log_prob(a[:, None]).exp() * slope, u)) == pytest.approx(1, abs=1e-6)


def test_draws_follow_the_density() -> None:
    m = drawn(k=3, n=1, seed=4)
    many = ActionMixture(*(one.expand(40_000, *one.shape) for one in (m.means, m.log_stds, m.logits)))
    found = many.rsample(torch.Generator().manual_seed(0))
    often = torch.bincount(found.primitive, minlength=3) / 40_000
    torch.testing.assert_close(often.double(), m.w, atol=0.01, rtol=0)
    edges = torch.linspace(-1, 1, 21, dtype=DOUBLE)
    middle = torch.linspace(-0.9999, 0.9999, 20_001, dtype=DOUBLE)
    density = m.log_prob(middle[:, None]).exp()
    for low, high in itertools.pairwise(edges):
        share = float(((found.action >= low) & (found.action < high)).double().mean())
        inside = (middle >= low) & (middle < high)
        assert share == pytest.approx(float(density[inside].sum() * (middle[1] - middle[0])), abs=0.012)
    own = m.component_log_prob(found.action).gather(-1, found.primitive[:, None]).squeeze(-1)
    torch.testing.assert_close(found.log_prob, own, rtol=1e-6, atol=1e-6)


def test_all_primitives_and_the_units_of_actions() -> None:
    m = drawn(5, k=3, n=2)
    low, high = torch.tensor([-2.0, 0.0]).double(), torch.tensor([2.0, 1.0]).double()
    scaled = ActionMixture(m.means, m.log_stds, m.logits, low, high)
    unit, other = (one.rsample_all(torch.Generator().manual_seed(1)) for one in (m, scaled))
    assert unit.actions.shape == (5, 3, 2)
    torch.testing.assert_close(
        other.actions, unit.actions * torch.tensor([2.0, 0.5]) + torch.tensor([0.0, 0.5])
    )
    torch.testing.assert_close(other.log_probs, unit.log_probs - math.log(2 * 0.5))
    assert float(scaled.log_scale) == pytest.approx(math.log(2 * 0.5))
    for i in range(3):
        density = scaled.component_log_prob(other.actions[:, i])[:, i]
        torch.testing.assert_close(density, other.log_probs[:, i], rtol=1e-6, atol=1e-6)


def test_the_tails_are_stable() -> None:
    """1 - tanh^2 is 0 in float32 from 9 on; rlkit's log(1 - tanh^2 + 1e-6) is wrong from 7 on."""
    means = torch.tensor([[[30.0], [-30.0]]], requires_grad=True)
    m = ActionMixture(means, torch.full((1, 2, 1), -3.0), torch.zeros(1, 2))
    _, log_probs = m.rsample_all(torch.Generator().manual_seed(0))
    noise = torch.randn(1, 2, 1, generator=torch.Generator().manual_seed(0)).double()
    u = m.means.double() + math.exp(-3) * noise
    exact = -0.5 * noise**2 + 3 - 0.5 * math.log(2 * math.pi) - (2 * math.log(2) - 2 * u.abs())
    torch.testing.assert_close(log_probs.double(), exact.squeeze(-1), rtol=1e-5, atol=0)
    log_probs.sum().backward()
    assert means.grad is not None
    torch.testing.assert_close(means.grad.flatten(), torch.tensor([2.0, -2.0]))


def test_at_the_bounds() -> None:
    m = drawn(3, k=2, n=2, dtype=torch.float32, low=torch.tensor([-0.4, -2.0]), high=torch.tensor([0.4, 2.0]))
    for a in (torch.tensor([0.4, 2.0]), torch.tensor([-0.4, 2.0 + 1e-7])):
        density = m.log_prob(a.expand(3, 2))
        assert bool(density.isfinite().all())
    assert bool((m.log_prob(torch.tensor([0.4, 2.0]).expand(3, 2)) < m.log_prob(torch.zeros(3, 2))).all())


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ([0.0, 2.1], r"actions\[1, 1\] is 2\.1, outside of the policy's bounds -2 to 2"),
        ([-0.5, 0.0], r"actions\[1, 0\] is -0\.5, outside of the policy's bounds -0\.4 to 0\.4"),
        ([math.nan, 0.0], r"actions\[1, 0\] is nan"),
    ],
)
def test_actions_out_of_bounds(action: list[float], says: str) -> None:
    m = drawn(2, k=2, n=2, dtype=torch.float32, low=torch.tensor([-0.4, -2.0]), high=torch.tensor([0.4, 2.0]))
    with pytest.raises(optx.OptxError, match=says):
        m.log_prob(torch.tensor([[0.0, 0.0], action]))


def test_an_action_of_no_policy_of_minus_one_to_one() -> None:
    with pytest.raises(optx.OptxError, match=r"is 1\.5, outside of the policy's bounds -1 to 1"):
        drawn(k=2, n=1).log_prob(torch.tensor([1.5]))


def test_the_entropy_is_between_its_bounds() -> None:
    for more in ({}, {"squash": False}, {"low": torch.full((2,), -3.0), "high": torch.full((2,), 1.0)}):
        m = drawn(4, k=3, n=2, seed=2, dtype=torch.float32, **more)
        many = ActionMixture(
            *(one.expand(50_000, *one.shape) for one in (m.means, m.log_stds, m.logits)),
            m.low,
            m.high,
            m.squash,
        )
        found = -many.log_prob(many.sample(torch.Generator().manual_seed(0))).mean(0)
        low, high = m.entropy_bounds()
        assert bool((low - 0.02 <= found).all() and (found <= high + 0.02).all())
        assert bool((high - low < math.log(3)).all())


def test_of_one_primitive_the_entropy_is_exact() -> None:
    """By quadrature over a fine grid, also where tanh has made two peaks of one."""
    for log_std in (-2.0, 0.0, 2.0):
        m = ActionMixture(
            torch.tensor([[0.7]]).double(), torch.tensor([[log_std]]).double(), torch.zeros(1).double()
        )
        z = torch.linspace(-12, 12, 400_001, dtype=DOUBLE)
        u = 0.7 + math.exp(log_std) * z
        log_normal = -0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        mass = (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
        exact = float(torch.trapezoid(mass * (log_slope - log_normal), z))
        low, high = m.entropy_bounds()
        assert float(low) == pytest.approx(exact, abs=1e-7)
        assert float(high) == pytest.approx(exact, abs=1e-7)


def test_far_apart_the_bounds_meet() -> None:
    means = torch.tensor([[-50.0], [0.0], [50.0]]).double()
    m = ActionMixture(means, torch.zeros(3, 1).double(), torch.tensor([0.0, 1.0, 0.3]).double(), squash=False)
    low, high = m.entropy_bounds()
    exact = 0.5 + 0.5 * math.log(2 * math.pi) - float((m.w * m.log_w).sum())
    assert float(low) == pytest.approx(exact)
    assert float(high) == pytest.approx(exact)


def test_evaluation_and_greed() -> None:
    m = drawn(2000, k=3, n=2)
    drawn_ones = m.evaluation_action(generator=torch.Generator().manual_seed(0))
    same = (drawn_ones.unsqueeze(1) == m.means.tanh()).all(-1)
    assert bool(same.any(-1).all())
    torch.testing.assert_close(same.double().mean(0), m.w.mean(0), atol=0.04, rtol=0)
    greedy = m.evaluation_action(greedy=True)
    assert torch.equal(greedy, m.means.tanh()[torch.arange(2000), m.w.argmax(-1)])
    tied = ActionMixture(m.means, m.log_stds, torch.zeros_like(m.logits))
    assert torch.equal(tied.evaluation_action(greedy=True), m.means.tanh()[:, 0])


def test_one_primitive_takes_no_random_number_for_its_draw() -> None:
    m = drawn(6, k=1, n=2)
    torch.manual_seed(0)
    action, log_prob, primitive = m.rsample()
    torch.manual_seed(0)
    noise = torch.randn(6, 2, dtype=DOUBLE)
    assert torch.equal(action, (m.means[:, 0] + m.log_stds[:, 0].exp() * noise).tanh())
    assert not primitive.any()
    assert torch.equal(m.w, torch.ones(6, 1, dtype=DOUBLE))
    torch.manual_seed(0)
    every = m.rsample_all()
    assert torch.equal(every.actions[:, 0], action)
    assert torch.equal(every.log_probs[:, 0], log_prob)


def test_it_is_a_tree_and_can_be_copied() -> None:
    m = drawn(3, low=torch.full((2,), -2.0).double(), high=torch.ones(2).double())
    leaves, tree = _pytree.tree_flatten(m)
    assert len(leaves) == 5
    again = _pytree.tree_unflatten(leaves, tree)
    for one in (again, copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.detach()):
        assert torch.equal(one.log_prob(m.centres[:, 0]), m.log_prob(m.centres[:, 0]))
    assert _pytree.tree_map(lambda leaf: leaf.shape, m).means == (3, 4, 2)
    with pytest.raises(
        AttributeError, match=r"an ActionMixture has no 'chunk'\. It is what the policy's output"
    ):
        m.chunk(2, -1)


def test_what_does_not_go_together() -> None:
    m = drawn(3)
    for parts in ((m.means, m.log_stds[:2], m.logits), (m.means, m.log_stds, m.logits[:, :2])):
        with pytest.raises(optx.ShapeError, match="ActionMixture: means have shape"):
            ActionMixture(*parts)
    with pytest.raises(optx.OptxError, match="low and high go together"):
        ActionMixture(m.means, m.log_stds, m.logits, low=torch.zeros(2))
    with pytest.raises(optx.OptxError, match="low and high go together, and with squash=True alone"):
        ActionMixture(m.means, m.log_stds, m.logits, -torch.ones(2), torch.ones(2), squash=False)
    with pytest.raises(optx.ShapeError, match=r"actions have shape \(3, 1\); they must be \(\.\.\., 2\)"):
        m.log_prob(torch.zeros(3, 1))


@pytest.mark.parametrize("bounds", [(-0.1, 1.1), (5.0, 5.1), (1000.1, 1000.9), (-0.4, 0.4), (0.1, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_no_action_rounds_to_one_beyond_the_bounds(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    """Environments refuse it; and where bounds are near each other, `log_prob` took it for another's."""
    low, high = (torch.full((2,), one, dtype=DOUBLE).to(dtype) for one in bounds)
    m = drawn(500, k=2, n=2, dtype=dtype)
    wide = ActionMixture(30 * m.means, m.log_stds, m.logits, low, high)
    for a in (wide.sample(torch.Generator().manual_seed(0)), wide.evaluation_action(greedy=True)):
        assert bool(((a >= low) & (a <= high)).all())
        assert bool(wide.log_prob(a).isfinite().all())
    assert bool((wide.centres - low < 1e-3 * (high - low)).any())
    assert bool((high - wide.centres < 1e-3 * (high - low)).any())


def test_entropies_of_deviations_beyond_the_range_of_float32() -> None:
    """exp(100) is infinite in float32, and 0 times it nan."""
    means, log_stds = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[-50.0], [-49.0]]])
    for found, exact in zip(
        ActionMixture(means, log_stds, torch.zeros(1, 2)).entropy_bounds(),
        ActionMixture(means.double(), log_stds.double(), torch.zeros(1, 2).double()).entropy_bounds(),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
