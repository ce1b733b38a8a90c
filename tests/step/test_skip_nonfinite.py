"""``skip_nonfinite=True``: a step with an inf or nan gradient does not happen at all, and is counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_cases import BF16, F32, draw
from torch import Tensor, nn

import optx

BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
CHAINS: dict[str, Any] = {
    "none": list,
    "perp adamr": lambda: [optx.PerpGrad(), optx.AdamR(0.1, normalize=False)],
    "adamr": lambda: [optx.AdamR(0.1)],
}
CASES = [
    *(("sgd momentum", "perp adamr", fused) for fused in (True, False)),
    *(("adamw", "adamr", fused) for fused in (True, False)),
    ("sgd", "none", False),
    ("sgd", "perp adamr", False),
    ("adamw", "perp adamr", False),
    ("rmsprop", "perp adamr", False),
]
SHAPES: list[tuple[int, ...]] = [(5,), (), (0,), (4, 3), (40_000,)]
every_case = pytest.mark.parametrize(("base", "chain", "fused"), CASES)


def make(
    base: str, chain: str, fused: Any, dtype: torch.dtype = F32
) -> tuple[list[nn.Parameter], optx.Wrapped]:
    params = [nn.Parameter(w) for w in draw(SHAPES, 0, dtype)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return params, optx.wrap(BASES[base](groups), *CHAINS[chain](), fused=fused, skip_nonfinite=True)


def give(params: list[nn.Parameter], seed: int, bad: tuple[int, float] | None = None) -> None:
    for p, g in zip(params, draw(SHAPES, seed, params[0].dtype), strict=True):
        p.grad = g
    if bad:
        g = params[bad[0]].grad
        assert g is not None
        g.view(-1)[-1] = bad[1]


def snapshot(params: list[nn.Parameter], opt: optx.Wrapped) -> dict[str, Tensor | float]:
    """Every weight, every state tensor and every number of the groups."""
    everything: dict[str, Any] = {f"w{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for key, value in opt.state.get(p, {}).items():
            everything[f"{i} {key}"] = copy.deepcopy(value)
    for i, group in enumerate(opt.param_groups):
        everything.update({f"group {i} {k}": v for k, v in group.items() if k != "params"})
    return everything


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert same, key


@pytest.mark.long(keep=2)
@every_case
@pytest.mark.parametrize("when", [0, 2], ids=["first step", "later"])
def test_nothing_changes_and_the_run_goes_on_as_if_it_had_not_been(
    base: str, chain: str, fused: bool, when: int
) -> None:
    params, opt = make(base, chain, fused)
    for step in range(when):
        give(params, step + 1)
        opt.step()
    before = snapshot(params, opt)
    for number, bad in enumerate(
        [(0, float("nan")), (1, float("inf")), (3, float("-inf")), (4, float("nan"))]
    ):
        give(params, 90, bad)
        opt.step()
        assert_equal(snapshot(params, opt), before)
        assert opt.skipped_steps == number + 1
    clean, straight = make(base, chain, fused)
    for step in range(4):
        give(clean, step + 1)
        straight.step()
    for step in range(when, 4):
        give(params, step + 1)
        opt.step()
    assert opt.skipped_steps == 4
    assert straight.skipped_steps == 0
    assert_equal(snapshot(params, opt), snapshot(clean, straight))


@every_case
def test_with_a_closure(base: str, chain: str, fused: bool) -> None:
    """It is evaluated once, and its loss comes back, skipped or not."""
    params, opt = make(base, chain, fused)
    evaluated = []

    def closure(bad: bool) -> Tensor:
        evaluated.append(bad)
        give(params, 1, (3, float("inf")) if bad else None)
        return torch.tensor(2.5)

    before = snapshot(params, opt)
    loss = opt.step(lambda: closure(True))
    assert float(loss) == 2.5
    assert_equal(snapshot(params, opt), before)
    assert opt.skipped_steps == 1
    assert float(opt.step(lambda: closure(False))) == 2.5
    assert opt.skipped_steps == 1
    assert not torch.equal(params[0].detach(), before["w0"])
    assert evaluated == [True, False]


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_the_transforms_and_random_numbers_do_not_advance(fused: bool) -> None:
    """A skipped bfloat16 step draws nothing: the next one rounds as if there had been none."""
    results = []
    for skips in (0, 3):
        params, opt = make("adamw", "perp adamr", fused, BF16)
        for _ in range(skips):
            give(params, 7, (0, float("nan")))
            opt.step()
        assert opt.param_groups[0]["optx.step"] == 0
        give(params, 1)
        opt.step()
        assert opt.param_groups[0]["optx.step"] == 1
        results.append(snapshot(params, opt))
    assert_equal(*results)


@pytest.mark.parametrize("fused", [True, False])
def test_without_it_a_nan_goes_through_as_in_torch(fused: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), fused=fused)
    p.grad = torch.tensor([0.0, float("nan"), 1.0])
    opt.step()
    assert opt.skipped_steps == 0
    assert p.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("fused", [True, False])
def test_large_gradients_are_finite(fused: bool) -> None:
    """Their squares overflow float32, they do not."""
    for n in (3, 70_000):
        p = nn.Parameter(torch.ones(n))
        opt = optx.wrap(torch.optim.SGD([p], lr=1e-30), fused=fused, skip_nonfinite=True)
        p.grad = torch.full((n,), 1e30)
        opt.step()
        assert opt.skipped_steps == 0
        assert float(p.detach().abs().max()) < 1e-6


def test_a_bad_gradient_in_a_loose_group_holds_back_the_fused_ones() -> None:
    whole = torch.zeros(4, 6)
    fast, slow = nn.Parameter(torch.ones(4)), nn.Parameter(whole[:, ::2])
    opt = optx.wrap(torch.optim.SGD([{"params": [fast]}, {"params": [slow]}], lr=1.0), skip_nonfinite=True)
    assert [g.path for g in opt.plan()] == ["fused cpu", "foreach"]
    for bad in (fast, slow):
        fast.grad, slow.grad = torch.ones(4), torch.ones(4, 3)
        bad.grad[-1] = float("nan")
        opt.step()
        assert torch.equal(fast.detach(), torch.ones(4))
        assert not whole.any()
    assert opt.skipped_steps == 2
