"""DAREx-q's number: what models' inputs tell, and q found by outputs, scores or layers (arXiv 2410.09344)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapter_models import bert, llama
from delta_cases import normal
from prune_cases import Holder, pair
from torch import Tensor, nn

from optx import Delta, OptxError
from optx.delta import search_q
from optx.delta._input_stats import input_stats
from optx.delta.search_q import find_q

# ---- statistics ------------------------------------------------------------------------------------------


def test_statistics_are_means_of_means() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    inputs = [normal(2, 5, 3), normal(1, 9, 3, seed=1)]
    one = input_stats(model, inputs)["0.weight"]
    every = torch.cat([x.reshape(-1, 3) for x in inputs])
    torch.testing.assert_close(one.norm, every.norm(dim=0))
    means = torch.cat([x.mean(1) for x in inputs])
    torch.testing.assert_close(one.mean, means.mean(0))
    assert one.tokens == 19
    assert model.training
    assert model[1].training
    assert not model[0]._forward_pre_hooks


def test_statistics_leave_no_hook_behind_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4)).train()
    with pytest.raises(RuntimeError):
        input_stats(model, [torch.ones(2, 7)])
    assert not model[0]._forward_pre_hooks
    assert model.training
    with pytest.raises(OptxError, match="batches is empty"):
        input_stats(model, [])


# ---- finding q -------------------------------------------------------------------------------------------


def test_search_follows_the_specification() -> None:
    asked: list[float] = []

    def quality(q: float) -> float:
        asked.append(q)
        return -abs(q - 0.31)

    best = search_q.search(quality, p=0.9, step=0.05)
    assert best == pytest.approx(0.31, abs=1e-9)
    coarse = [q for q in asked if abs(q / 0.05 - round(q / 0.05)) < 1e-6]
    assert max(asked) == pytest.approx(0.5)  # four in a row that are no improvement on 0.3
    assert min(asked) == pytest.approx(0.1)
    assert len(coarse) >= 9
    fine = sorted(set(asked) - set(coarse))
    assert fine[0] == pytest.approx(0.3 - 0.9 * 0.05)


def test_search_ends_though_larger_is_always_better() -> None:
    """As for a model that pruning has ruined: the best is the base, and 1 is 2000 steps away."""
    tried: list[float] = []
    best = search_q.search(lambda q: tried.append(q) or q, p=0.999)  # type: ignore[func-returns-value]
    assert best == pytest.approx(0.016)
    assert len(tried) < 50
    assert search_q.search(lambda q: q, p=0.999, step=0.1) == pytest.approx(1.0, abs=0.1)  # as far as asked


def test_search_survives_nan_and_stays_within_one() -> None:
    assert search_q.search(lambda q: math.nan if q < 0.6 else q, p=0.5, step=0.05) == pytest.approx(1.0)


def test_val_asks_with_pruned_weights_and_puts_them_back() -> None:
    base, tuned = pair()
    model = Holder().train()
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    delta = Delta.between(base, tuned)
    seen: list[Tensor] = []

    def score(pruned: nn.Module) -> float:
        assert not pruned.training
        seen.append(pruned.get_parameter("a.weight").detach().clone())
        return 0.0

    q = find_q(delta, model, [], 0.9, "val", score=score, seeds=(5,))
    assert q == pytest.approx(0.1)
    torch.testing.assert_close(seen[0], delta.dare(0.9, q=0.1, seed=5).apply(base)["a.weight"])
    assert model.training
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_output_finds_a_larger_q_where_it_is_better() -> None:
    """With 50 inputs and p = 0.99 the noise of DARE outweighs the change itself."""
    base, tuned = pair()
    model, x = Holder(), normal(200, 50, seed=9)
    delta = Delta.between(base, tuned)
    q = find_q(delta, model, [x], 0.99)
    assert isinstance(q, float)
    assert q > 0.02
    apart = []
    for factor in (q, 0.01):
        pruned = Holder()
        far = []
        for seed in range(20, 40):
            pruned.load_state_dict(dict(delta.dare(0.99, q=factor, seed=seed).apply(base)))
            far.append((pruned(x) - model(x)).detach().abs().mean().item())
        apart.append(sum(far) / len(far))
    assert apart[0] < apart[1]


@pytest.mark.parametrize("strategy", ["analytic", "mse"])
def test_per_layer_q_of_a_real_model(strategy: Any) -> None:
    base, tuned = bert(), bert()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(normal(*p.shape, seed=number) / 50)
    delta, batch = Delta.between(base, tuned), {"input_ids": torch.arange(24).view(2, 12)}
    q = delta.find_q(tuned, [batch], 0.9, strategy)
    assert isinstance(q, dict)
    assert len(q) == 2 * 6 + 1  # the layers' six and the pooler; the classifier is left out
    assert all(0.1 <= one <= 1.0 for one in q.values())
    assert len(set(q.values())) > 5
    delta.dare(0.9, q=q).apply(base)


def test_output_of_a_language_model_is_its_largest_logits() -> None:
    base, tuned = llama(), llama()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(normal(*p.shape, seed=number) / 20)
    batch = {"input_ids": torch.arange(24).view(2, 12)}
    q = Delta.between(base, tuned).find_q(tuned, [batch], 0.9, step=0.1, seeds=(0, 1))
    assert 0.1 <= q <= 1.0  # type: ignore[operator]
    with torch.no_grad():
        full, other = tuned(**batch), base(**batch)
    top = full.logits.topk(5, -1)
    expected = (other.logits.gather(-1, top.indices) - top.values).square().mean()
    assert search_q.output_distance(full, other) == pytest.approx(float(expected))
    with pytest.raises(OptxError, match="gives a str"):
        search_q.output_distance("a", "b")


def test_output_of_a_classifier_is_its_hidden_states_where_it_gives_them() -> None:
    class Output:
        def __init__(self, logits: Tensor, *states: Tensor) -> None:
            self.logits, self.hidden_states = logits, states or None

    logits, states = normal(2, 3, seed=1), [normal(2, 5, 4, seed=i) for i in (2, 3)]
    others = [state + 0.5 for state in states]
    told = search_q.output_distance(Output(logits, *states), Output(logits, states[0], others[1]))
    assert told == pytest.approx(0.5)
    assert search_q.output_distance(Output(logits), Output(logits + 2)) == pytest.approx(2)
