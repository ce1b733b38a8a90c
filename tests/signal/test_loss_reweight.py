"""LossReweight: the spec's numbers, laws over drawn losses, schedules, state, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loss_reweight as reference
from torch import Tensor
from torch.nn import functional as F

import optx

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0])
NAMES = ("linupper", "quadratic", "extremes", "upper", "uniform")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
each_strategy = pytest.mark.parametrize("name", NAMES)
drawn = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40)


def close(a: Tensor, b: Any, off: float = 1e-6) -> bool:
    return bool(((a - torch.as_tensor(b, dtype=a.dtype)).abs() <= off).all())


# ---- the spec's properties --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "loss"),
    [
        ("linupper", [0.12368148, 0.20391629, 0.33620112, 0.33620112], 3.22112299),
        ("quadratic", [0.14629975, 0.30971657, 0.39768394, 0.14629975], 2.69028343),
        ("extremes", [0.33620112, 0.20391629, 0.12368148, 0.33620112], 2.79608371),
    ],
)
def test_numbers_of_the_spec(name: str, weights: list[float], loss: float) -> None:
    rw = optx.LossReweight(name, r=1.0)
    assert float(rw(LOSSES)) == pytest.approx(loss, abs=1e-6)
    assert rw.last_weights is not None
    assert close(rw.last_weights, weights)


def test_numbers_of_other_temperatures_and_caps() -> None:
    weights: Callable[..., Tensor] = lambda **k: optx.LossReweight(**k).weights(LOSSES)  # noqa: E731
    assert close(weights(), [0.03465564, 0.12096007, 0.42219214, 0.42219214])
    assert close(weights(r=100.0), 0.25, 0.002)
    assert close(weights(r=1.0, alpha=2.0), [0.07839412, 0.12925005, 0.21309730, 0.57925853])
    assert close(weights(strategy="upper", r=0.5), weights(r=1.0, alpha=2.0))


@each_strategy
@settings(max_examples=40)
@given(drawn, st.floats(0.05, 5), st.floats(0.2, 3))
def test_as_computed_by_hand(name: str, losses: list[float], r: float, delta: float) -> None:
    rw = optx.LossReweight(name, r=r, delta=delta)
    exact = torch.tensor(losses, dtype=torch.float64)
    assert close(rw.weights(exact), reference.weights(losses, name, r, delta), 1e-9)
    loss = rw(exact.requires_grad_())
    assert float(loss.detach()) == pytest.approx(float((rw.weights(exact) * exact.detach()).sum()), rel=1e-12)


@each_strategy
@settings(max_examples=40)
@given(drawn, st.floats(0.1, 100), st.floats(0.01, 100), st.floats(-50, 50), st.randoms())
def test_scale_shift_and_order_do_not_matter(
    name: str, losses: list[float], r: float, a: float, b: float, random: Any
) -> None:
    rw = optx.LossReweight(name, r=r)
    exact = torch.tensor(losses, dtype=torch.float64)
    spread = float(exact.max() - exact.min())
    weights = rw.weights(exact)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    if spread == 0 or min(spread, a * spread) > 1e-4:  # below 1e-6 losses count as hardly different
        assert close(rw.weights(a * exact + b), weights, 1e-4)
    order = random.sample(range(len(losses)), len(losses))
    assert close(rw.weights(exact[order]), weights[order], 1e-12)


@each_strategy
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(drawn)
def test_weights_sum_to_1_in_every_dtype(name: str, dtype: torch.dtype, losses: list[float]) -> None:
    rw = optx.LossReweight(name, r=0.4)
    for batch in (torch.tensor(losses).to(dtype), torch.tensor(losses * 30).to(dtype)):
        loss = rw(batch)
        assert rw.last_weights is not None
        assert rw.last_weights.dtype == loss.dtype == torch.promote_types(dtype, torch.float32)
        assert float(rw.last_weights.double().sum()) == pytest.approx(1, abs=1e-6)
        assert float(rw.last_weights.min()) > 0


@each_strategy
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_losses_are_weighted_equally(name: str, dtype: torch.dtype) -> None:
    for size, loss in itertools.product((1, 2, 33), (0.0, 0.1, 7.3, 60000.0)):
        weights = optx.LossReweight(name).weights(torch.full((size,), loss, dtype=dtype))
        assert len(set(weights.tolist())) == 1
        assert close(weights, 1 / size, 1e-7)


def test_hot_is_uniform_and_cold_is_the_upper_half() -> None:
    assert optx.LossReweight(r=1e6)(LOSSES).item() == pytest.approx(2.75, abs=1e-5)
    assert close(optx.LossReweight(r=1e-3).weights(LOSSES), [0, 0, 0.5, 0.5])
    assert optx.LossReweight(r=1e-30).weights(LOSSES).tolist() == [0, 0, 0.5, 0.5]


@given(drawn, st.floats(0.1, 5))
def test_linupper_grows_up_to_the_middle(losses: list[float], r: float) -> None:
    exact = torch.tensor(losses, dtype=torch.float64).sort().values
    weights = optx.LossReweight(r=r).weights(exact)
    assert bool((weights.diff() >= -1e-15).all())
    upper = weights[exact >= (exact[0] + exact[-1]) / 2 + 1e-9]
    assert len(upper) == 0 or float(upper.max() - upper.min()) <= 1e-15
    if exact[-1] - exact[0] > 1e-5:
        assert float(weights[-1] / weights[0]) == pytest.approx(math.exp(1 / r), rel=1e-9)


@each_strategy
def test_weights_carry_no_gradient(name: str) -> None:
    losses = LOSSES.clone().requires_grad_()
    rw = optx.LossReweight(name)
    rw(losses).backward()
    assert losses.grad is not None
    assert rw.last_weights is not None
    assert rw.last_mean is not None
    assert torch.equal(losses.grad, rw.last_weights)
    assert not rw.last_weights.requires_grad
    assert not rw.last_mean.requires_grad
    assert float(rw.last_mean) == 2.75


# ---- the limit of a weight --------------------------------------------------------------------------------


@given(drawn, st.floats(0.02, 3), st.floats(1, 5), st.sampled_from(NAMES))
def test_a_limit_is_kept_and_the_rest_keeps_its_ratios(
    losses: list[float], r: float, limit: float, name: str
) -> None:
    exact = torch.tensor(losses, dtype=torch.float64)
    plain = optx.LossReweight(name, r=r).weights(exact)
    weights = optx.LossReweight(name, r=r, max_weight=limit).weights(exact)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    assert float(weights.max()) * len(losses) <= limit * (1 + 1e-9)
    assert close(weights, reference.capped(plain.tolist(), limit), 1e-7)


def test_a_limit_that_does_not_bind_changes_nothing_and_1_is_uniform() -> None:
    assert close(optx.LossReweight(max_weight=4.0).weights(LOSSES), optx.LossReweight().weights(LOSSES))
    assert close(optx.LossReweight(max_weight=1.0).weights(LOSSES), 0.25, 1e-7)
    assert close(optx.LossReweight(max_weight=1.2).weights(LOSSES), [0.1, 0.3, 0.3, 0.3])
    cold = optx.LossReweight(r=1e-3, max_weight=1.5).weights(LOSSES)  # the others' weights are e^-1000
    assert close(cold, [0.0, 0.25, 0.375, 0.375])
    many = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    limited = optx.LossReweight(r=0.1, max_weight=1.000001).weights(many)
    assert float(limited.double().sum()) == pytest.approx(1, abs=1e-6)
    assert float(limited.max()) * 5000 <= 1.0001


# ---- masks, tokens and logits -----------------------------------------------------------------------------


def test_tokens_are_averaged_first() -> None:
    tokens = torch.tensor([[1.0, 3.0, 99.0], [4.0, 99.0, 99.0], [5.0, 6.0, 7.0], [99.0, math.nan, 99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    rw = optx.LossReweight(r=1.0)
    loss = rw(tokens, mask)
    wanted = optx.LossReweight(r=1.0)
    assert torch.equal(loss, wanted(torch.tensor([2.0, 4.0, 6.0])))
    assert rw.last_weights is not None
    assert wanted.last_weights is not None
    assert torch.equal(rw.last_weights, torch.cat([wanted.last_weights, torch.zeros(1)]))
    assert float(rw.last_mean or 0) == 4.0
    assert torch.equal(wanted(torch.tensor([[1.0, 3.0], [4.0, 4.0]])), wanted(torch.tensor([2.0, 4.0])))
    assert float(rw(tokens, torch.zeros_like(mask))) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_as_cross_entropy_has_them(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=g).to(dtype)
    labels = torch.randint(11, (5, 7), generator=g)
    labels[0, 3:] = labels[1, :] = -100
    rw, own = optx.LossReweight(), optx.LossReweight()
    wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    tokens = F.cross_entropy(wide[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    counts = labels[:, 1:] != -100
    wanted = rw(tokens, counts)
    got = own.from_logits(logits.requires_grad_(), labels)
    assert got.dtype == wide.dtype
    assert torch.allclose(got, wanted, rtol=1e-6)
    got.backward()
    wanted.backward()
    assert logits.grad is not None
    assert wide.grad is not None
    assert torch.allclose(logits.grad.to(wide.dtype), wide.grad, atol=torch.finfo(dtype).eps)
    flat = rw.from_logits(logits[:, 0], labels[:, 0].clamp_min(0))  # classification: nothing to shift
    each = F.cross_entropy(wide[:, 0], labels[:, 0].clamp_min(0), reduction="none")
    assert torch.allclose(flat, rw(each), rtol=1e-6)
    unshifted = rw.from_logits(logits, labels, shift=False)
    tokens = F.cross_entropy(wide.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(unshifted, rw(tokens, labels != -100), rtol=1e-6)


def test_length_weighting_is_the_authors_form() -> None:
    tokens = torch.tensor([[1.0, 3.0], [4.0, 9.0], [5.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    means, lengths = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([2.0, 1.0, 2.0])
    rw = optx.LossReweight(r=1.0, length_weighting=True)
    wanted = 3 * (rw.weights(means) * lengths / 5 * means).sum()
    assert torch.allclose(rw(tokens, mask), wanted)
    plain = optx.LossReweight("uniform", length_weighting=True)
    assert torch.allclose(plain(tokens, mask), tokens[mask.bool()].mean())
    equal = optx.LossReweight(length_weighting=True)
    assert torch.allclose(equal(tokens, torch.ones_like(mask)), optx.LossReweight()(tokens))


# ---- schedules and state ----------------------------------------------------------------------------------


def temperatures(rw: optx.LossReweight, calls: int) -> list[float]:
    found: list[float] = []
    for _ in range(calls):
        found.append(rw.temperature())
        rw(LOSSES)
    return found


def test_schedules() -> None:
    inf = math.inf
    assert temperatures(optx.LossReweight(warmup=2), 4) == [inf, inf, 0.4, 0.4]
    assert temperatures(optx.LossReweight(warmup=2, warmup_r=100.0), 3) == [100.0, 100.0, 0.4]
    assert temperatures(optx.LossReweight(r=1.0, anneal=4, r_start=3.0), 6) == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    late = optx.LossReweight(r=1.0, warmup=1, anneal=2, r_start=2.0)
    assert temperatures(late, 4) == [inf, 2.0, 1.5, 1.0]
    assert temperatures(optx.LossReweight(r=lambda t: 1 + t, warmup=1), 3) == [inf, 2.0, 3.0]
    assert temperatures(optx.LossReweight(warmup=2, accumulate=2), 5) == [inf, inf, inf, inf, 0.4]


def test_no_step_and_no_weight_without_gradients() -> None:
    rw = optx.LossReweight()
    with torch.no_grad():
        assert torch.equal(rw(LOSSES), LOSSES.mean())
        masked = rw(torch.tensor([[1.0, 5.0], [9.0, 9.0]]), torch.tensor([[1, 0], [0, 0]]))
    assert float(masked) == 1.0
    assert rw.step == 0
    assert rw.last_weights is None


@pytest.mark.parametrize("off", [{"strategy": "uniform"}, {"r": math.inf}, {"warmup": 9}])
def test_off_is_the_mean_to_the_bit_and_draws_nothing(off: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    rw = optx.LossReweight(**off)
    for size in (1, 3, 31, 1000):
        a = torch.randn(size, generator=g).requires_grad_()
        b = a.detach().clone().requires_grad_()
        loss, mean = rw(a), b.mean()
        loss.backward()
        mean.backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(loss, mean)
        assert torch.equal(a.grad, b.grad)
        assert rw.last_weights is not None
        assert close(rw.last_weights, 1 / size)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 12), st.integers(1, 3))
def test_a_resumed_run_is_the_same_to_the_bit(cut: int, accumulate: int) -> None:
    def make() -> optx.LossReweight:
        return optx.LossReweight(
            r=0.5, warmup=2, anneal=3, r_start=2.0, accumulate=accumulate, skip_nonfinite=True
        )

    def run(rw: optx.LossReweight, calls: range) -> list[float]:
        return [float(rw(LOSSES + torch.tensor([0.0, 0.1, 0.3, 0.7]) * call)) for call in calls]

    whole, first, second = make(), make(), make()
    wanted = run(whole, range(12))
    got = run(first, range(cut))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert got + run(second, range(cut, 12)) == wanted
    assert second.state_dict() == whole.state_dict()


# ---- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "linear"}, "strategy is 'linear'; it must be one of 'linupper'"),
        ({"r": 0}, "r is 0; it must be above 0"),
        ({"r": -1.0}, "r is -1.0"),
        ({"r": math.nan}, "r is nan"),
        ({"r": "0.4"}, "r is '0.4'"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 0.1}, "warmup is 0.1; it must be a whole number"),
        ({"warmup_r": 100.0}, "give the number of steps too"),
        ({"anneal": 10}, "give both, or none"),
        ({"r_start": 2.0}, "give both, or none"),
        ({"anneal": 10, "r_start": 2.0, "r": lambda t: 1.0}, "between two finite numbers"),
        ({"anneal": 10, "r_start": math.inf}, "between two finite numbers"),
        ({"delta": 0.0}, "delta is 0.0; it must be above 0"),
        ({"delta": math.inf}, "delta is inf"),
        ({"alpha": 2.0, "strategy": "quadratic"}, "only 'linupper' has one"),
        ({"max_weight": 0.9}, "max_weight is 0.9; it must be at least 1.0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words) as raised:
        optx.LossReweight(**options)
    assert str(raised.value).startswith("LossReweight: ")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda rw: rw(LOSSES.mean()), "the loss is reduced already"),
        (lambda rw: rw.weights(LOSSES.mean()), "the loss is reduced already"),
        (lambda rw: rw(torch.tensor([1, 2])), "losses have dtype torch.int64"),
        (lambda rw: rw(torch.zeros(0)), "are of no sample"),
        (lambda rw: rw(torch.zeros(3, 0)), "of no token"),
        (lambda rw: rw(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool)), r"mask has shape \(3,\)"),
        (lambda rw: rw(torch.zeros(3), torch.ones(3)), "mask has dtype torch.float32"),
        (
            lambda rw: rw.from_logits(torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.long)),
            "labels have shape",
        ),
        (lambda rw: rw.from_logits(torch.zeros(3, 4), torch.zeros(3)), "labels have dtype torch.float32"),
        (lambda rw: rw.from_outputs({"logits": torch.zeros(3, 4, 5)}, None), "the batch has no labels"),
        (lambda rw: rw.load_state_dict({"step": 3}), "the state has step; it must have calls, skipped, step"),
        (lambda rw: rw.load_state_dict({"step": -3, "calls": 0, "skipped": 0}), "the state's step is -3"),
        (lambda rw: rw.load_state_dict({"step": 3, "calls": 1, "skipped": 0}), "after 1 calls of a step"),
    ],
)
def test_bad_calls_change_nothing(call: Callable[[optx.LossReweight], Any], words: str) -> None:
    rw = optx.LossReweight(warmup=3)
    rw(LOSSES)
    before = (rw.state_dict(), rw.last_weights, rw.last_mean)
    with pytest.raises(optx.OptxError, match=words):
        call(rw)
    assert (rw.state_dict(), rw.last_weights, rw.last_mean) == before


def test_more_that_is_refused() -> None:
    with pytest.raises(optx.OptxError, match="length_weighting needs a mask"):
        optx.LossReweight(length_weighting=True)(LOSSES)
    with pytest.raises(optx.OptxError, match=r"r\(0\) is -1"):
        optx.LossReweight(r=lambda t: -1)(LOSSES)
