"""The step of soft thinking: the paper's numbers, laws of the draws, and order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.thinking import _mix
from optx.thinking._mix import Limits
from optx.thinking.soft_thinking import SoftThinking

EXACT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PI = EXACT.float()


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def thought(p: Tensor, K: int, seed: int = 0, **options: Any) -> _mix.Mixture:
    ids = torch.arange(p.shape[-1]).expand(p.shape)
    one = torch.Generator().manual_seed(seed)  # for all rows, which are alike
    return _mix.thought(p, ids, K, SoftThinking(**options), [one] * len(p))


# ---- the numbered properties ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "wanted"),
    [
        (0.5, [0.52606242, 0.05704090, 0.41689668]),
        (1.0, [0.45055125, 0.14836066, 0.40108809]),
        (0.1, [0.76185189, 0.00001142, 0.23813669]),
    ],
)
def test_weights_by_gumbel_softmax(tau: float, wanted: list[float]) -> None:
    """Property 1."""
    found = _mix.softmax(EXACT.log() + torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64), tau)
    assert found.tolist() == pytest.approx(wanted, abs=6e-9)


@pytest.mark.parametrize("tau", [1e-30, 0.1, 0.5, 3.0])
def test_the_heaviest_is_drawn_as_pi_says(tau: float) -> None:
    """Property 2, by one generator for each of the rows."""
    ids, *_ = thought(PI.expand(100_000, 3), 3, noise="gumbel", tau=tau)
    shares = torch.bincount(ids[:, 0], minlength=3) / len(ids)
    assert shares.tolist() == pytest.approx(PI.tolist(), abs=0.005)


def test_dirichlet_moments() -> None:
    """Property 3."""
    made = thought(PI.expand(40_000, 3), 3, noise="dirichlet", alpha=4.0)
    x = torch.empty_like(made.weights).scatter_(1, made.ids, made.weights)
    assert x.mean(0).tolist() == pytest.approx(PI.tolist(), rel=0.03)
    assert x.var(0).tolist() == pytest.approx([0.05, 0.042, 0.032], rel=0.03)
    sure = thought(PI[None], 3, noise="dirichlet", alpha=1e8)
    assert sure.ids.tolist() == [[0, 1, 2]]
    assert sure.weights[0].tolist() == pytest.approx(PI.tolist(), abs=1e-3)


@pytest.mark.parametrize("alpha", [1e-8, 1e-3, 1e20])
def test_dirichlet_has_numbers_whatever_alpha(alpha: float) -> None:
    p = torch.tensor([[1 - 2e-6, 1e-6, 1e-6, 0.0]]).expand(500, 4)
    made = thought(p, 3, noise="dirichlet", alpha=alpha)
    assert made.weights.isfinite().all()
    assert made.weights.sum(-1) == pytest.approx(torch.ones(500), abs=1e-5)
    assert (made.weights[made.ids == 3] == 0).all()  # what is dropped stays so


def test_filters_in_order() -> None:
    """Property 4."""
    p = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    assert _mix.filtered(p, Limits(1.0, 4, 0.85, 0.0))[:3].tolist() == pytest.approx([0.5, 0.3125, 0.1875])
    assert not _mix.filtered(p, Limits(1.0, 4, 0.85, 0.0))[3:].any()
    ids, found = _mix.candidates(p.log()[None], Limits(1.0, 4, 0.85, 0.0))
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert found[0].tolist() == pytest.approx([0.5, 0.3125, 0.1875, 0.0])
    assert _mix.filtered(p, Limits(1.0, 0, 1.0, 0.3))[:3].tolist() == pytest.approx([0.5, 0.3125, 0.1875])
    assert torch.equal(_mix.filtered(p, Limits(1.0, 0, 1.0, 0.0)), p)


def test_entropy() -> None:
    """Property 7, first half."""
    assert float(_mix.entropy(EXACT)) == pytest.approx(1.02965301, abs=6e-9)
    assert float(_mix.entropy(EXACT)) / math.log(3) == pytest.approx(0.93723056, abs=6e-9)
    assert float(_mix.entropy_of(EXACT.log() + 40)) == pytest.approx(1.02965301, abs=6e-9)
    masked = torch.tensor([[0.0, -torch.inf, 2.0], [5.0, -torch.inf, -torch.inf]])
    assert torch.allclose(_mix.entropy_of(masked), _mix.entropy(masked.softmax(-1)), atol=1e-6)
    wrong = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
    assert not _mix.entropy_of(wrong).isfinite().any()


# ---- what the paper leaves open -------------------------------------------------------------------------


def test_equals_come_in_the_order_of_their_tokens() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 7::4] = 1.0
    for top_k in (1, 3, 9, 0):
        ids, _ = _mix.candidates(logits, Limits(1.0, top_k, 1.0, 0.0))
        assert ids[0, 0] == logits.argmax()
        assert ids[0, :3].tolist() == sorted(ids[0, :3].tolist())


def test_a_record_has_a_floor_and_rails() -> None:
    p = torch.tensor([[1.0, 0.0]]).expand(3000, 2)
    bare, kept = (thought(p, 2, noise="gumbel", record=record) for record in (False, True))
    assert (bare.gprime[:, 1] == -torch.inf).all()
    order = kept.ids.argsort(-1)
    noise = kept.gprime.gather(1, order) - torch.tensor([[1.0, 0.0]]).add(1e-6).log()
    assert float(noise.min()) == pytest.approx(-1.5, abs=1e-5)
    assert float(noise.max()) == pytest.approx(3.0, abs=1e-5)
    assert ((noise - -1.5).abs() < 1e-5).float().mean() == pytest.approx(math.exp(-math.exp(1.5)), abs=0.004)
    assert ((noise - 3.0).abs() < 1e-5).float().mean() == pytest.approx(1 - math.exp(-math.exp(-3)), abs=0.01)
    louder = thought(p, 2, noise="gumbel", noise_factor=2.0)
    assert torch.allclose(louder.gprime[:, 0], 2 * bare.gprime[:, 0])


def test_tokens_are_sampled_as_p_says() -> None:
    """Step 10, and what is dropped is never drawn."""
    p = torch.tensor([0.6, 0.3, 0.1, 0.0]).expand(50_000, 4)
    place = _mix.sampled(p, generators(1) * len(p))
    shares = torch.bincount(place, minlength=4) / len(p)
    assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.007)
    assert shares[3] == 0


def reference(logits: np.ndarray, o: SoftThinking, noise: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The step in words of the paper, one row, over the whole vocabulary, in float64."""
    z = logits.astype(np.float64) / o.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    if o.top_k:
        for i in order[o.top_k :]:
            p[i] = 0
        p /= p.sum()
    before = 0.0
    for i in order:
        share = p[i]
        if before >= o.top_p - 1e-9:
            p[i] = 0
        before += share
    p /= p.sum()
    p[p < o.min_p * p.max() * (1 - 1e-6)] = 0
    p /= p.sum()
    K = o.width(len(p))
    chosen = order[:K]
    pi = p[chosen] / p[chosen].sum()
    if o.noise is None:
        return chosen, pi
    with np.errstate(divide="ignore"):
        g = (np.log(pi + o.log_floor) + noise[:K]) / o.tau
    y = np.exp(g - g.max())
    y /= y.sum()
    again = sorted(range(K), key=lambda k: -g[k])
    return [chosen[k] for k in again], y[again]


@given(
    st.integers(2, 40),
    st.integers(0, 45),
    st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([None, "gumbel"]),
    st.sampled_from([0.1, 0.5, 2.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_a_step_is_the_papers(
    V: int,
    top_k: int,
    top_p: float,
    min_p: float,
    max_topk: int | None,
    noise: Any,
    tau: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    options = SoftThinking(
        noise=noise, tau=tau, top_k=top_k, top_p=top_p, min_p=min_p, max_topk=max_topk, temperature=0.7
    )
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype).float()
    K = options.width(V)
    ids, p = _mix.candidates(logits, options.limits)
    made = _mix.thought(p, ids, K, options, generators(2, seed))
    assert made.weights.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)  # property 6
    assert (made.weights >= 0).all()
    assert (made.weights.diff(dim=-1) <= 0).all()
    for row, generator in enumerate(generators(2, seed)):
        drawn = optx._gumbel.gumbel((K,), generator=generator).double().numpy()
        chosen, y = reference(logits[row].numpy(), options, drawn)
        there = y > 1e-6
        assert [made.ids[row, k].item() for k in np.flatnonzero(there)] == [
            chosen[k] for k in np.flatnonzero(there)
        ]
        assert made.weights[row].numpy() == pytest.approx(y, abs=2e-5)
