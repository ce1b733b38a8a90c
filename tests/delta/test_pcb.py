"""PCB-Merging's laws (arXiv 2410.02396), the numbered properties of its specification first."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx._safetensors import Entry
from optx.delta._merge_method import Changes
from optx.delta.pcb import _code_form, _code_scores

T0 = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, 0.6, -0.7, 0.8, -0.9, 1.0])
T1 = torch.tensor([1.0, 0.9, -0.8, -0.7, 0.6, -0.5, 0.4, 0.3, 0.2, -0.1])


def tau(method: optx.PCB, *changes: Tensor) -> Tensor:
    base = {"w": torch.zeros(changes[0].shape)}
    made = optx.merge(base, [{"w": change} for change in changes], method)
    return made["w"]  # type: ignore[index]


def changes_of(*rows: Tensor) -> Changes:
    entry = Entry(tuple(rows[0].shape), rows[0].dtype)
    return Changes({"w": entry}, len(rows), lambda _: lambda begin, end: [row[begin:end] for row in rows])


def weights(ratio: float, *changes: Tensor) -> list[list[float]]:
    return [w.tolist() for w in _code_form(optx.PCB(ratio), changes_of(*changes))(changes)[0]]


def test_1_outliers_are_clamped() -> None:
    clamped = _code_form(optx.PCB(), changes_of(T0, T1))([T0, T1])[1]
    assert clamped[0][-1].item() == pytest.approx(0.9)
    assert clamped[1][0].item() == pytest.approx(0.9)


def test_2_scores() -> None:
    scores = _code_scores([T0, T1], optx.PCB(), [(0.1, 0.9), (0.1, 0.9)])
    expected = [0.109558, -0.143508, -0.168709, 0.547990, 0.825218, 0.130895, 0.637502]
    expected += [3.266451, 4.123479, 5.292765]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_3_a_ratio_of_three_tenths_leaves_two_of_ten() -> None:
    first, second = weights(0.3, T0, T1)
    assert first == pytest.approx([0] * 8 + [0.422949, 1], abs=1e-5)
    assert second == pytest.approx([1, 0.543259] + [0] * 8, abs=1e-5)
    assert tau(optx.PCB(0.3), T0, T1).tolist() == pytest.approx([0.9, 0.9, 0, 0, 0, 0, 0, 0, -0.9, 0.9])


def test_4_a_ratio_of_a_half() -> None:
    first, second = weights(0.5, T0, T1)
    assert first == pytest.approx([0, 0, 0, 0, 0.040324, 0, 0, 0.564726, 0.748825, 1], abs=1e-5)
    assert second[:4] == pytest.approx([1, 0.614880, 0.106113, 0.156808], abs=1e-5)
    expected = [0.9, 0.9, -0.8, -0.7, 0.5, 0, 0, 0.8, -0.9, 0.9]
    assert tau(optx.PCB(0.5), T0, T1).tolist() == pytest.approx(expected)


OPTIONS = [optx.PCB(inter=inter) for inter in ("sum", "normsum", "pairwise")] + [optx.PCB(score="paper")]


def random_changes(models: int, numbers: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(numbers, generator=g) for _ in range(models)]


@pytest.mark.parametrize("method", OPTIONS, ids=repr)
def test_5_identical_models(method: optx.PCB) -> None:
    [change] = random_changes(1, 400, 3)
    made = tau(method, change, change, change)
    low, high = change.abs().sort().values[[int(400 * 1e-4), int(400 * (1 - 1e-4) - 1)]]
    clamped = change if method.score == "paper" else change.sign() * change.abs().clamp(low, high)
    kept = made != 0
    assert 0 < int(kept.sum()) <= 40
    torch.testing.assert_close(made[kept], clamped[kept], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", OPTIONS, ids=repr)
@settings(max_examples=15)
@given(models=st.integers(2, 4), numbers=st.integers(5, 300), seed=st.integers(0, 10_000))
def test_6_and_7_order_and_range(method: optx.PCB, models: int, numbers: int, seed: int) -> None:
    changes = random_changes(models, numbers, seed)
    made = tau(method, *changes)
    torch.testing.assert_close(tau(method, *changes[::-1]), made, rtol=1e-3, atol=1e-5)
    shuffled = torch.randperm(numbers, generator=torch.Generator().manual_seed(seed))
    permuted = tau(method, *[change[shuffled] for change in changes])
    torch.testing.assert_close(permuted, made[shuffled], rtol=1e-3, atol=1e-5)
    stacked = torch.stack(changes)
    assert (made <= stacked.amax(0).clamp(min=0) + 1e-5).all()
    assert (made >= stacked.amin(0).clamp(max=0) - 1e-5).all()
    base = {"w": torch.randn(numbers)}
    tuned = [{"w": base["w"] + change} for change in changes]
    none = optx.merge(base, tuned, optx.PCB(lam=0.0, score=method.score, inter=method.inter))
    assert torch.equal(none["w"], base["w"])  # type: ignore[index]


@pytest.mark.parametrize("method", [optx.PCB(0.2, inter="pairwise"), optx.PCB(0.2, score="paper")], ids=repr)
def test_8_scale(method: optx.PCB) -> None:
    changes = random_changes(3, 500, 0)
    made = tau(method, *changes)
    torch.testing.assert_close(tau(method, *[8 * c for c in changes]), 8 * made, rtol=1e-4, atol=1e-5)


def test_8_the_sum_form_depends_on_the_scale() -> None:
    changes = random_changes(3, 500, 0)
    made = tau(optx.PCB(0.2), *changes)
    assert (tau(optx.PCB(0.2), *[8 * c for c in changes]) - 8 * made).abs().max() > 0.5


def paper_form(changes: list[Tensor], ratio: float, lam: float) -> Tensor:
    """The paper's equations, written out in float64."""
    t = torch.stack(changes).double()
    n, d = t.shape

    def norm(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    intra = torch.stack([torch.softmax(n * norm(row * row), 0) for row in t])
    inter = torch.stack([sum(torch.softmax(norm(t[i] * t[j]), 0) for j in range(n)) for i in range(n)])
    beta = intra * inter
    bar = beta.sort(1).values[:, d - int(ratio * d), None]
    kept = torch.where(beta >= bar, beta, 0)
    mass = kept.sum(0)
    return lam * (kept * t).sum(0) / torch.where(mass == 0, 1, mass)


def code_form(changes: list[Tensor], ratio: float, lam: list[float], inter: str, clip: float) -> Tensor:
    """The authors' code as the specification gives it, over the whole model at once."""
    t = torch.stack(changes).double()
    n, d = t.shape

    def mm(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    def clipped(x: Tensor, low: float, high: float) -> Tensor:
        s = x.sort(1).values
        return x.clamp(s[:, int(d * low), None], s[:, int(d * (1 - high) - 1), None])

    a = clipped(t.abs(), clip, clip)
    signed = t.sign() * mm(a)
    agreement = {
        "sum": lambda: torch.tanh(t * t.sum(0)),
        "normsum": lambda: torch.tanh(t * signed.sum(0)),
        "pairwise": lambda: torch.tanh(signed[:, None] * signed[None]).sum(1),
    }[inter]()
    s = mm(clipped(torch.exp(n * mm(a) ** 2) * agreement, 1 - ratio, 0))
    numerator = (torch.tensor(lam, dtype=torch.float64)[:, None] * s * t.sign() * a).sum(0)
    return numerator / s.sum(0).clamp(min=1e-12)


def near(made: Tensor, expected: Tensor) -> None:
    """Equal but for entries at the threshold, whose weight is next to nothing."""
    wrong = (made.double() - expected).abs() > 1e-3 * (1 + expected.abs())
    assert int(wrong.sum()) <= 1, (made[wrong], expected[wrong])


@settings(max_examples=25)
@given(
    models=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    ratio=st.sampled_from([0.05, 0.1, 0.4, 0.9]),
    clip=st.sampled_from([1e-4, 0.01]),
    inter=st.sampled_from(["sum", "normsum", "pairwise", "paper"]),
    seed=st.integers(0, 10_000),
)
def test_as_written_out_over_the_whole_model(
    models: int, sizes: list[int], ratio: float, clip: float, inter: Any, seed: int
) -> None:
    """Streaming tensor by tensor gives what sorting everything at once does."""
    d = sum(sizes)
    if d < 20:
        return
    rows = random_changes(models, d, seed)
    base = {f"w{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    tuned = [dict(zip(base, row.split(sizes), strict=True)) for row in rows]
    lam = [0.5 + 0.25 * i for i in range(models)]
    if inter == "paper":
        made = optx.merge(base, tuned, optx.PCB(ratio, 0.7, score="paper"))
        expected = paper_form(rows, ratio, 0.7)
    else:
        made = optx.merge(base, tuned, optx.PCB(ratio, lam, inter=inter, clip=clip))
        expected = code_form(rows, ratio, lam, inter, clip)
    near(torch.cat(list(made.values())), expected)  # type: ignore[union-attr]


def test_scope_tensor_is_each_tensor_alone() -> None:
    rows = random_changes(2, 300, 5)
    base = {"a": torch.zeros(100), "b": torch.zeros(200)}
    tuned = [{"a": row[:100], "b": 10 * row[100:]} for row in rows]
    made: Any = optx.merge(base, tuned, optx.PCB(scope="tensor"))
    for name in base:
        alone: Any = optx.merge({name: base[name]}, [{name: t[name]} for t in tuned], optx.PCB())
        assert torch.equal(made[name], alone[name])
    whole: Any = optx.merge(base, tuned, optx.PCB())
    assert not torch.equal(made["a"], whole["a"])


@pytest.mark.parametrize("method", OPTIONS, ids=repr)
def test_models_that_changed_nothing_or_evenly(method: optx.PCB) -> None:
    zero, even = torch.zeros(50), torch.full((50,), 0.5)
    assert torch.equal(tau(method, zero, zero), zero)  # no division by 0
    assert tau(method, even, even).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "PCB: ratio is 0.0"),
        ({"ratio": 1.5}, "PCB: ratio is 1.5"),
        ({"clip": 0.6}, "PCB: clip is 0.6"),
        ({"score": "both"}, "PCB: score is 'both'; it must be one of 'code', 'paper'"),
        ({"inter": "x"}, "PCB: inter is 'x'"),
        ({"scope": "layer"}, "PCB: scope is 'layer'"),
        ({"lam": (1.0, 2.0, 3.0)}, "PCB: lam has 3 numbers, and there are 2 models"),
        ({"ratio": math.nan}, "PCB: ratio is nan"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError) as caught:
        tau(optx.PCB(**options), T0, T1)
    assert message in str(caught.value)


@pytest.mark.long
def test_digits_ahead_of_ties_at_equal_scale() -> None:
    """The specification's milder experiment: base on 300 digits in four views, one expert for each view."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.set_num_threads(1)  # two only wait for one another here
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    views = [x, x.rot90(1, (1, 2)), x.rot90(3, (1, 2)), 1 - x]

    def network() -> nn.Sequential:
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(nn.Flatten(), *layers)

    def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    def one(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        train_on, test_on = torch.randperm(len(x)).tensor_split([1200])
        base = network()
        some = train_on[:300]
        train(base, torch.cat([view[some] for view in views]), y[some].repeat(4), 15, 2e-3)
        experts = [copy.deepcopy(base) for _ in views]
        for expert, view in zip(experts, views, strict=True):
            train(expert, view[train_on], y[train_on], 15, 6e-4)

        def accuracy(method: optx.MergeMethod) -> float:
            model = network()
            model.load_state_dict(optx.merge(base, experts, method))  # type: ignore[arg-type]
            right = [(model(view[test_on]).argmax(1) == y[test_on]).float().mean() for view in views]
            return float(sum(right)) / 4

        return accuracy(optx.PCB(0.05, 0.5)), accuracy(optx.TIES(0.2, 0.5))

    pcb, ties = zip(*(one(seed) for seed in range(3)), strict=True)
    assert sum(pcb) >= sum(ties)
    assert min(pcb) > 0.75
