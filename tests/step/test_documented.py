"""The transforms that the documentation writes, on the paths of a CPU, beside other implementations."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import pytorch_optimizer
import torch
from documented import documented, longest
from fused_cases import draw
from torch import Tensor, nn

import optx

SHAPES = [(5,), (), (3, 7), (4, 3, 2, 2), (60, 50)]
THINGS = (optx.Moments, optx.counter, optx.per_row)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    folder = tmp_path_factory.mktemp("documented")
    return {thing.__name__: documented(thing, folder) for thing in THINGS}


def test_none_is_longer_than_25_lines() -> None:
    assert 5 < max(map(longest, THINGS)) <= 25


def train(make: Callable[[list[nn.Parameter]], Any], change: Callable[[Tensor], Tensor] | None = None) -> Any:
    weights = [nn.Parameter(w) for w in draw(SHAPES, 3, torch.float32)]
    optimizer = make(weights)
    for seed in range(7):
        for p, g in zip(weights, draw(SHAPES, 100 + seed, torch.float32), strict=True):
            p.grad = change(g.clone()) if change else g.clone()
        optimizer.step()
    return optimizer, weights


def base(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.05, weight_decay=0.1)


def near(got: list[nn.Parameter], wanted: list[nn.Parameter]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


PATHS = pytest.mark.parametrize("fused", [False, "cpu"])


@PATHS
def test_lookahead_is_pytorch_optimizers(examples: dict[str, ModuleType], fused: Any) -> None:
    made = examples["counter"].Lookahead
    _, wanted = train(lambda p: pytorch_optimizer.Lookahead(base(p), k=3, alpha=0.25))
    near(train(lambda p: optx.wrap(base(p), made(k=3, alpha=0.25), fused=fused))[1], wanted)


@PATHS
def test_centralisation_is_pytorch_optimizers(examples: dict[str, ModuleType], fused: Any) -> None:
    def centralised(g: Tensor) -> Tensor:
        pytorch_optimizer.centralize_gradient(g)
        return g

    made = examples["per_row"].Centralise
    near(train(lambda p: optx.wrap(base(p), made(), fused=fused))[1], train(base, centralised)[1])


class CautiousStep:
    """What pytorch_optimizer's function makes of a step that torch's optimizer took."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights, self.base = weights, base(weights)

    @torch.no_grad()
    def step(self) -> None:
        before = [w.clone() for w in self.weights]
        self.base.step()
        for w, w0 in zip(self.weights, before, strict=True):
            update = w0 - w
            pytorch_optimizer.base.optimizer.BaseOptimizer.apply_cautious(update, w.grad)
            w.copy_(w0 - update)


@PATHS
def test_cautious_is_pytorch_optimizers(examples: dict[str, ModuleType], fused: Any) -> None:
    made = examples["Moments"].Cautious
    near(train(lambda p: optx.wrap(base(p), made(), fused=fused))[1], train(CautiousStep)[1])


class ClippedRows:
    """The example's arithmetic, row by row in Python."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights, self.base = weights, base(weights)
        self.usual: dict[tuple[int, int], float] = {}

    def step(self) -> None:
        for i, w in enumerate(self.weights):
            assert w.grad is not None
            for j, row in enumerate(w.grad if w.ndim > 1 else [w.grad]):
                norm = float(row.double().norm())
                usual = self.usual.get((i, j), norm)
                kept = min(norm, 1.1 * usual)
                self.usual[i, j] = 0.9 * usual + 0.1 * kept
                row.mul_(kept / norm)
        self.base.step()


@PATHS
def test_rows_are_clipped_one_by_one(examples: dict[str, ModuleType], fused: Any) -> None:
    made = examples["per_row"].ClipRows
    reference, wanted = train(ClippedRows)
    opt, got = train(lambda p: optx.wrap(base(p), made(limit=1.1), fused=fused))
    near(got, wanted)
    for i, p in enumerate(got):
        usual = [value for (t, _), value in sorted(reference.usual.items()) if t == i]
        assert opt.state[p]["optx.clip_rows.usual"].tolist() == pytest.approx(usual, rel=1e-5)
