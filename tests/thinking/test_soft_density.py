"""`optx.functional.soft_logprob` against the paper's formula, worked figures and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx._gumbel import gumbel
from optx.functional import soft_logprob

NAT = torch.float64
OLD, NEW = ([0.6, 0.3, 0.08, 0.02], [0.7, 0.2, 0.08, 0.02])
NOISE = torch.tensor([0.5, -0.3, 1.2, 0.4], dtype=NAT)
ALL = torch.arange(4)


def old() -> Tensor:
    return torch.tensor(OLD, dtype=NAT)


def formula(
    z: Tensor, ids: Tensor, g: Tensor, T: float, reduce: str, clamp: tuple[float, float] | None, kappa: float
) -> Tensor:
    """Of one step, as the specification words it: shares of all tokens first, then of the stored ones."""
    p = (z / T).exp() / (z / T).exp().sum()
    at = [p[int(i)] for i, one in zip(ids, g, strict=True) if one > -torch.inf]
    total, terms, counts = sum(at), [], []
    for share, noisy in zip(at, g[g > -torch.inf], strict=True):
        log_share = torch.log(share / total + 1e-6)
        e = (noisy - log_share) / kappa
        if clamp:
            e = e.clamp(*clamp)
        terms.append(-e - torch.exp(-e))
        counts.append(reduce == "sum" or float(log_share.detach()) > -3)
    kept = [term for term, count in zip(terms, counts, strict=True) if count]
    if not kept:
        return 0 * z.sum()
    return sum(kept) / (1 if reduce == "sum" else len(kept))


def test_steps_without_noise_have_the_largest_density() -> None:
    g = (old() + 1e-6).log()
    assert float(soft_logprob(old().log(), ALL, g)) == pytest.approx(-1, abs=1e-12)
    assert float(soft_logprob(old().log(), ALL, g, reduce="sum")) == pytest.approx(-4, abs=1e-12)


@pytest.mark.parametrize(
    ("reduce", "before", "after", "ratio"),
    [("masked_mean", -1.21919456, -1.18667784, 1.03305117), ("sum", -4.72790373, -4.63035356, 1.10246674)],
)
def test_the_worked_step(reduce: str, before: float, after: float, ratio: float) -> None:
    g = (old() + 1e-6).log() + NOISE
    first = soft_logprob(old().log(), ALL, g, reduce=reduce)
    second = soft_logprob(torch.tensor(NEW, dtype=NAT).log(), ALL, g, reduce=reduce)
    assert float(first) == pytest.approx(before, abs=6e-9)
    assert float(second) == pytest.approx(after, abs=6e-9)
    assert float((second - first).exp()) == pytest.approx(ratio, abs=6e-9)


def test_the_worked_gradient() -> None:
    z = old().log().requires_grad_()
    soft_logprob(z, ALL, (old() + 1e-6).log() + NOISE).backward()
    wanted = torch.tensor([-0.01732539, -0.19086002, 0.21313480, -0.00494939], dtype=NAT)
    torch.testing.assert_close(z.grad, wanted, rtol=0, atol=1e-8)
    assert abs(float(z.grad.sum())) < 1e-12


def test_slots_may_come_in_any_order_and_logits_may_be_moved() -> None:
    z = torch.randn(3, 9, dtype=NAT, generator=torch.Generator().manual_seed(0))
    ids = z.topk(4).indices
    g = z.gather(1, ids).log_softmax(1) + gumbel(ids.shape, dtype=NAT)
    order = torch.tensor([2, 0, 3, 1])
    found = soft_logprob(z, ids, g)
    torch.testing.assert_close(soft_logprob(z, ids[:, order], g[:, order]), found)
    torch.testing.assert_close(soft_logprob(z + 5.0, ids, g), found)


def test_the_score_of_gumbel_noise_is_unbiased() -> None:
    noise = gumbel((100_000,), generator=torch.Generator().manual_seed(0), dtype=NAT)
    shares = old().log().expand(25_000, 4).clone().requires_grad_()
    logp = soft_logprob(
        shares, ALL.expand(25_000, 4), old().log() + noise.reshape(-1, 4), reduce="sum", noise_clamp=None
    )
    logp.sum().backward()
    assert abs(float((1 - (-noise).exp()).mean())) < 0.01
    assert float(shares.grad.mean(0).abs().max()) < 0.01


def test_discrete_rows_are_the_tokens_log_probabilities() -> None:
    z = torch.randn(2, 5, 11, dtype=NAT).requires_grad_()
    ids = torch.randint(11, (2, 5, 3))
    g = torch.full((2, 5, 3), -torch.inf)
    every = torch.ones(2, 5, dtype=torch.bool)
    found = soft_logprob(z, ids, g, every, temperature=0.7)
    wanted = (z / 0.7).log_softmax(-1).gather(-1, ids[..., :1]).squeeze(-1)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(2, 5, dtype=NAT)
    (one,), (other,) = (torch.autograd.grad((x * weights).sum(), z) for x in (found, wanted))
    torch.testing.assert_close(one, other)
    alone = soft_logprob(z, ids[..., :1], g[..., :1], every, temperature=0.7)
    assert torch.equal(alone, found)


@given(data=st.data())
def test_all_options_agree_with_the_formula_and_its_gradient(data: st.DataObject) -> None:
    B, V = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 40))
    K = data.draw(st.integers(2, min(V, 6)))
    reduce = data.draw(st.sampled_from(["masked_mean", "sum"]))
    clamp = data.draw(st.sampled_from([(-1.5, 3.0), (-0.5, 0.5), None]))
    T, kappa = data.draw(st.sampled_from([1.0, 0.6, 2.5])), data.draw(st.sampled_from([1.0, 0.5]))
    dtype = data.draw(st.sampled_from([NAT, torch.float32, torch.bfloat16]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    z = (2 * torch.randn(B, V, generator=draw, dtype=NAT)).to(dtype)
    ids = torch.stack([torch.randperm(V, generator=draw)[:K] for _ in range(B)])
    g = torch.randn(B, K, generator=draw, dtype=NAT) - 2
    g[torch.rand(B, K, generator=draw) < data.draw(st.sampled_from([0.0, 0.3]))] = -torch.inf
    g[:, 0] = g[:, 0].clamp_min(-4.0)
    discrete = torch.rand(B, generator=draw) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    leaf, wide = z.clone().requires_grad_(), z.to(NAT).requires_grad_()
    stored = g if dtype == NAT else g.float()
    found = soft_logprob(
        leaf, ids, stored, discrete, temperature=T, noise_factor=kappa, reduce=reduce, noise_clamp=clamp
    )
    wanted = torch.stack(
        [
            (wide[b] / T).log_softmax(0)[ids[b, 0]]
            if discrete[b]
            else formula(wide[b], ids[b], stored[b].to(NAT), T, reduce, clamp, kappa)
            for b in range(B)
        ]
    )
    assert found.dtype == (NAT if dtype == NAT else torch.float32)
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == NAT else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.to(NAT), wanted, **tight)
    found.sum().backward()
    wanted.sum().backward()
    assert leaf.grad.dtype == dtype
    if dtype == torch.bfloat16:
        tight = {"rtol": 2**-7, "atol": 1e-7 + 2**-7 * float(wide.grad.abs().max())}
    torch.testing.assert_close(leaf.grad.to(NAT), wide.grad, **tight)


def test_rows_of_many_pieces_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, ids = torch.randn(7, 13).requires_grad_(), torch.randint(13, (7, 2))
    discrete = torch.arange(7) != 3
    g = torch.randn(7, 2)
    whole = soft_logprob(z, ids, g, discrete)
    gradient = torch.autograd.grad(whole.sum(), z)[0]
    monkeypatch.setattr("optx._soft_density._CHUNK", 26)
    pieces = soft_logprob(z, ids, g, discrete)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces.sum(), z)[0], gradient)


def test_a_mask_of_an_earlier_policy_and_a_temperature_for_each_row() -> None:
    z, g = torch.tensor([OLD, NEW]).log(), torch.tensor([OLD, NEW]).log()
    ids = ALL.expand(2, 4)
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    found = soft_logprob(z, ids, g + 0.5, mask=mask, temperature=torch.tensor([1.0, 1.0]))
    one = -0.5 - torch.exp(torch.tensor(-0.5))
    torch.testing.assert_close(found, one.expand(2), rtol=1e-4, atol=1e-4)
    by_row = soft_logprob(z, ids, g, temperature=torch.tensor([0.5, 2.0]))
    apart = [soft_logprob(z[i], ids[i], g[i], temperature=T) for i, T in enumerate((0.5, 2.0))]
    torch.testing.assert_close(by_row, torch.stack(apart))


def test_a_step_with_no_token_above_the_mask_says_0() -> None:
    z = torch.zeros(1, 30, requires_grad=True)
    ids = torch.arange(30)[None]
    found = soft_logprob(z, ids, torch.randn(1, 30) - 3)
    found.sum().backward()
    assert found.detach().item() == 0
    assert not z.grad.any()
    padding = soft_logprob(z, ids, torch.full((1, 30), -torch.inf))
    assert torch.autograd.grad(padding.sum(), z)[0].isfinite().all()


def test_memory_is_that_of_the_logits_and_their_gradient() -> None:
    """Of what autograd keeps, nothing else has V entries."""
    z = torch.randn(6, 1000, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        soft_logprob(z, torch.randint(1000, (6, 4)), torch.randn(6, 4), torch.arange(6) < 3)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= 1000}
    assert large == {z.untyped_storage().data_ptr()}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, optx.OptxError, "temperature is 0.0; it must be a finite number above 0"),
    ({"temperature": torch.tensor([1.0, -1.0])}, optx.OptxError, "temperature has entries"),
    ({"temperature": torch.ones(3)}, optx.ShapeError, r"temperature has shape \(3,\)"),
    ({"reduce": "mean"}, optx.OptxError, "reduce is 'mean'; it must be one of 'masked_mean', 'sum'"),
    ({"noise_clamp": (3.0, -1.5)}, optx.OptxError, r"noise_clamp is \(3.0, -1.5\)"),
    ({"noise_factor": 0.0}, optx.OptxError, "noise_factor is 0.0"),
    ({"noise_clamp": 3.0}, optx.OptxError, "noise_clamp is 3.0"),
    ({"gprime": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, "keep it in float32"),
    ({"gprime": torch.zeros(2, 2)}, optx.ShapeError, r"gprime \(2, 2\)"),
    ({"ids": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "ids have dtype torch.int32"),
    ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits have dtype torch.int64"),
    ({"discrete": torch.zeros(2)}, optx.ShapeError, "discrete has shape"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, optx.ShapeError, "mask has shape"),
    (
        {"ids": torch.zeros(2, 1, dtype=torch.int64), "gprime": torch.zeros(2, 1)},
        optx.OptxError,
        "ids have K=1 tokens a step; a mixture has at least 2",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD)
def test_mistakes(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {
        "logits": torch.zeros(2, 5),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "gprime": torch.zeros(2, 3),
    }
    with pytest.raises(kind, match=message):
        soft_logprob(**(good | changed))
