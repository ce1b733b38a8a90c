"""DAREx-q with one learned q per layer (arXiv 2410.09344)."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from adapter_models import bert, gpt2, llama
from delta_cases import normal
from prune_cases import Holder, pair

from optx import Delta, OptxError
from optx.delta import search_q
from optx.delta._delta_pruning import HEADS
from optx.delta._input_stats import linear_axes


@pytest.mark.parametrize(
    "kind", ["encoder", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("decoder", "conv1d"))]
)
def test_learned_q_lowers_the_distance_that_it_is_told(kind: str) -> None:
    base, tuned = {"encoder": bert, "decoder": llama, "conv1d": gpt2}[kind](), None
    tuned = copy.deepcopy(base).train()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(normal(*p.shape, seed=number) / 10)
    before = {name: t.clone() for name, t in tuned.state_dict().items()}
    delta, batch = Delta.between(base, tuned), {"input_ids": torch.arange(24).view(2, 12)}
    q = delta.find_q(tuned, [batch], 0.95, "learned", seeds=(0, 1))
    assert isinstance(q, dict)
    layers = [name for name, axis in linear_axes(tuned).items() if not re.fullmatch(HEADS, name)]
    assert sorted(q) == sorted(layers)
    assert all(0.05 <= one <= 1.0 for one in q.values())
    assert len(set(q.values())) > 1
    if kind != "conv1d":  # which goes on for all of its rounds
        assert q == delta.find_q(tuned, [batch], 0.95, "learned", seeds=(0, 1))
    assert tuned.training
    assert all(torch.equal(t, before[name]) for name, t in tuned.state_dict().items())
    assert all(p.grad is None for p in tuned.parameters())

    def far(given: Any) -> float:
        """As `dare` uses them, biases and norms included."""
        total = 0.0
        for seed in (0, 1):
            pruned = copy.deepcopy(base).eval()
            pruned.load_state_dict(dict(delta.dare(0.95, q=given, seed=seed).apply(base)))
            with torch.no_grad():
                total += search_q.output_distance(tuned.eval()(**batch), pruned(**batch))
        return total

    assert far(q) < 0.9 * far(None)


def test_learned_q_needs_layers_and_a_gradient() -> None:
    delta, x = Delta.between(*pair()), torch.ones(3, 50)
    with pytest.raises(OptxError, match="a distance that is a tensor with a gradient"):
        delta.find_q(Holder(), [x], 0.5, "learned", distance=lambda _full, _pruned: 1.0)
    with pytest.raises(OptxError, match=r"needs the weight of a torch.nn.Linear"):
        delta.find_q(Holder(), [x], 0.5, "learned", include=".*bias")
