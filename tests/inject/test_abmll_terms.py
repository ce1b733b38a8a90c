"""ABMLL's terms: deviations of outputs, divergence and hyper-prior, against whole matrices written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import abmll as reference
from torch import Tensor

from optx.inject import _abmll_terms as terms
from optx.inject._abmll_terms import Factors, divergence, output_deviation, surprise

C = 0.3
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))  # out, in, rank
KINDS = st.sampled_from(["softplus", "abs"])


def factors(sizes: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float64) -> Factors:
    out, into, rank = sizes
    g = torch.Generator().manual_seed(seed)
    shapes = ((rank, into), (out, rank)) * 2
    return Factors(*(torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes))


def scalar(mean: float, sigma: float) -> Factors:
    """A weight of one number, by sigma_param="abs" with c = 1."""
    return Factors(*(torch.tensor([[v]], dtype=torch.float64) for v in (1.0, mean, 1.0, sigma - 1.0)))


def pairs(f: Factors) -> dict[str, Tensor]:
    return f._asdict()


def same(found: Tensor, wanted: Tensor, by: list[Tensor]) -> None:
    """Values, and gradients by some tensors, are equal."""
    torch.testing.assert_close(found, wanted)
    upstream = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view(found.shape)
    ours, theirs = (torch.autograd.grad(v, by, upstream, allow_unused=True) for v in (found, wanted))
    for mine, yours, t in zip(ours, theirs, by, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(t) if yours is None else yours)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Matrices of these tests are made in several blocks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "_BLOCK", 8)
        yield


def test_one_number_s_divergence_is_that_of_the_specification():
    found = divergence(scalar(0.3, 0.2), scalar(0.1, 0.4), torch.tensor(1.0), "abs")
    assert float(found) == pytest.approx(0.44314718, abs=1e-7)


def test_one_number_s_prior_is_that_of_the_specification():
    of_mean = math.log(2 * math.pi) / 2
    one = torch.tensor(1.0)
    found = [float(surprise(scalar(0.0, s), one, "abs", 1.0, 0.01)) - of_mean for s in (0.5, 1.0, 1e4)]
    assert found[0] == pytest.approx(4.64517019, abs=1e-6)
    assert found[2] == pytest.approx(4.605170, abs=1e-6)
    assert found[0] > found[1] > found[2]


@settings(max_examples=25)
@given(SIZES, KINDS, st.integers(0, 99))
def test_divergence_and_its_gradients(sizes: tuple[int, int, int], kind: str, seed: int):
    q, p, c = factors(sizes, seed), factors(sizes, seed + 100), torch.tensor(C, dtype=torch.float64)
    same(divergence(q, p, c, kind), reference.divergence(pairs(q), pairs(p), C, kind), [*q, *p])
    fixed = Factors(*(t.detach() for t in p))
    same(divergence(q, fixed, c, kind), reference.divergence(pairs(q), pairs(fixed), C, kind), [*q])
    assert float(divergence(q, q, c, kind).detach()) == 0.0


@settings(max_examples=25)
@given(SIZES, KINDS, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([None, 0.01]), st.integers(0, 99))
def test_prior_and_its_gradients(
    sizes: tuple[int, int, int], kind: str, a0: float, b0: float | None, seed: int
):
    p, options = factors(sizes, seed), reference.Options(0.0, 0.0, kind, a0, b0)
    found = surprise(p, torch.tensor(C, dtype=torch.float64), kind, a0, b0)
    same(found, reference.surprise(pairs(p), C, options), [*p])


@settings(max_examples=25)
@given(SIZES, KINDS, st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99))
def test_deviation_of_outputs_and_its_gradients(
    sizes: tuple[int, int, int], kind: str, lead: list[int], seed: int
):
    f = factors(sizes, seed)
    x = torch.randn(*lead, sizes[1], dtype=torch.float64).requires_grad_()
    sigma = reference.weights(pairs(f), C, kind).stddev
    found = output_deviation(x, f, torch.tensor(C, dtype=torch.float64), kind)
    same(found, (x.square() @ sigma.square().t()).sqrt(), [x, f.A_std, f.B_std])


def test_inputs_of_zeros_have_no_deviation_and_a_gradient_of_zero():
    f, x = factors((3, 4, 2), 0), torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    std = output_deviation(x, f, torch.tensor(C), "softplus")
    assert not std.any()
    for grad in torch.autograd.grad(std.sum(), [x, f.A_std, f.B_std]):
        assert not grad.any()


def test_divergences_near_zero_and_at_tiny_deviations_keep_their_digits():
    q = factors((40, 30, 2), 0, torch.float32)
    p = Factors(*(t.detach() * (1 + 1e-5) for t in q))
    for c in (C, 1e-12):
        found = divergence(q, p, torch.tensor(c), "softplus")
        wide = [pairs(Factors(*(t.detach().double() for t in f))) for f in (q, p)]
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double().detach(), reference.divergence(*wide, c), rtol=2e-2, atol=0.0
        )


def test_half_precision_factors_are_summed_in_float32():
    """1e4 numbers of a divergence of about 1 each: in float16 the sum would be lost, and beta times it 0."""
    q, p = (Factors(*(t.detach().half() for t in factors((100, 100, 2), s))) for s in (0, 1))
    found = divergence(q, p, torch.tensor(C).half(), "softplus")
    wanted = reference.divergence(*(pairs(Factors(*(t.double() for t in f))) for f in (q, p)), C)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=0.0)
    assert float((1e-7 * found).detach()) > 0


def test_under_autocast_terms_are_as_without():
    q, p, c = factors((5, 6, 2), 0, torch.float32), factors((5, 6, 2), 1, torch.float32), torch.tensor(C)
    x = torch.randn(3, 6)
    calls: list[Any] = [
        lambda: divergence(q, p, c, "softplus"),
        lambda: surprise(p, c, "softplus", 1.0, None),
        lambda: output_deviation(x, q, c, "softplus"),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(call().sum(), [*q, *p], allow_unused=True)
        outside = torch.autograd.grad(call().sum(), [*q, *p], allow_unused=True)
        assert all(a is b or torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_no_matrix_of_the_weight_s_size_is_kept_for_the_backward_pass():
    q, p, c = factors((50, 60, 2), 0), factors((50, 60, 2), 1), torch.tensor(C, dtype=torch.float64)
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = torch.randn(4, 60, dtype=torch.float64)
        total = divergence(q, p, c, "softplus") + surprise(p, c, "softplus", 1.0, None)
        (total + output_deviation(x, q, c, "softplus").sum()).backward()
    assert max(kept) <= 4 * 60


def test_drawn_outputs_have_mean_and_variance_of_drawn_weights():
    f, x = factors((3, 4, 2), 0), torch.randn(2, 4, dtype=torch.float64)
    law = reference.weights(pairs(f), C)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        std = output_deviation(x, f, torch.tensor(C, dtype=torch.float64), "softplus")
        local = x @ law.mean.t() + std * torch.randn(100_000, 2, 3, generator=g, dtype=torch.float64)
        noise = torch.randn(100_000, 3, 4, generator=g, dtype=torch.float64)
        by_weights = torch.einsum("noi,bi->nbo", law.mean + law.stddev * noise, x)
    scale = float(std.max())
    torch.testing.assert_close(local.mean(0), by_weights.mean(0), rtol=0.0, atol=0.02 * scale)
    torch.testing.assert_close(local.var(0), by_weights.var(0), rtol=0.02, atol=0.0)
