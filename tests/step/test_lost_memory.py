"""Freed storages and reordered parameters: what the state machine found, as plain sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

LOST = r"has lost its memory \(its storage was freed or shrunk\)"


def two(fused: Any, *chain: optx.Transform) -> tuple[list[nn.Parameter], optx.Wrapped]:
    params = [nn.Parameter(torch.arange(4.0) + i) for i in range(2)]
    base = torch.optim.AdamW(params, lr=0.1, weight_decay=0.0)
    return params, optx.wrap(base, *chain, fused=fused)


def give(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def of_state(key: str) -> Callable[[Any, Any], Tensor]:
    return lambda opt, p: opt.state[p][key]


TENSORS: dict[str, Callable[[Any, Any], Tensor]] = {
    "its weight": lambda _, p: p.data,
    "its gradient": lambda _, p: p.grad,
    "exp_avg": of_state("exp_avg"),
    "exp_avg_sq": of_state("exp_avg_sq"),
    "optx.adamr.anchor": of_state("optx.adamr.anchor"),
}


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("which", TENSORS)
def test_freed_memory_is_refused_in_a_sentence(which: str, fused: Any) -> None:
    """torch's own loops read it, and the process ends."""
    params, opt = two(fused, optx.AdamR())
    give(params)
    opt.step()
    before = params[1].detach().clone()
    free(TENSORS[which](opt, params[0]))
    with pytest.raises(optx.OptxError, match=rf"parameter .*{which}.* {LOST}"):
        opt.step()
    assert torch.equal(params[1], before)
    assert float(opt.state[params[1]]["step"]) == 1.0


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_freed_weight_without_a_gradient_is_nobodys_business(fused: Any) -> None:
    params, opt = two(fused)
    give(params[1:])
    free(params[0].data)
    opt.step()
    assert (params[1] != torch.arange(4.0) + 1).all()


def test_second_moments_that_were_replaced_by_freed_ones_are_not_summed() -> None:
    params, opt = two("auto", optx.AdamR())
    give(params)
    opt.step()
    opt.state[params[0]]["exp_avg_sq"] = torch.ones(4)
    free(opt.state[params[0]]["exp_avg_sq"])
    with pytest.raises(optx.OptxError, match=LOST):
        opt.step()


def test_wrap_refuses_a_freed_weight() -> None:
    p = nn.Parameter(torch.ones(4))
    free(p.data)
    base = torch.optim.AdamW([p], weight_decay=0.0)
    with pytest.raises(optx.OptxError, match=rf"^AdamR: parameter .* {LOST}"):
        optx.wrap(base, optx.AdamR())


def test_a_freed_weight_before_the_first_step_is_not_compared_with_its_anchor() -> None:
    params, opt = two("auto", optx.AdamR())
    give(params)
    free(params[0].data)
    with pytest.raises(optx.OptxError, match=LOST):
        opt.step()


@pytest.mark.parametrize("fused", ["auto", False])
def test_parameters_in_another_order_keep_what_is_their_own(fused: Any) -> None:
    """One had its first gradient late: its place was taken for a replacement of the other's."""
    params, opt = two(fused, optx.AdamR())
    give(params[:1])
    opt.step()
    state, anchors = opt.state[params[0]]["exp_avg"], [torch.arange(4.0), torch.arange(4.0) + 1]
    opt.param_groups[0]["params"].reverse()
    give(params)
    opt.step()
    assert opt.state[params[0]]["exp_avg"] is state
    assert [float(opt.state[p]["step"]) for p in params] == [2.0, 1.0]
    for p, anchor in zip(params, anchors, strict=True):
        assert torch.equal(opt.state[p]["optx.adamr.anchor"], anchor)


@pytest.mark.parametrize("fused", ["auto", False])
def test_groups_in_another_order_keep_what_is_their_own(fused: Any) -> None:
    params = [nn.Parameter(torch.arange(4.0) + i) for i in range(2)]
    base = torch.optim.AdamW([{"params": [p]} for p in params], lr=0.1, weight_decay=0.0)
    opt = optx.wrap(base, optx.AdamR(), fused=fused)
    opt.param_groups.reverse()
    give(params)
    opt.step()
    for i, p in enumerate(params):
        assert torch.equal(opt.state[p]["optx.adamr.anchor"], torch.arange(4.0) + i)


@pytest.mark.parametrize("fused", ["auto", False])
def test_an_anchor_given_by_hand_is_not_replaced_by_the_one_before(fused: Any) -> None:
    """A weight that grew before its first step: what a person puts into its state lasts."""
    params, opt = two(fused, optx.AdamR())
    params[0].data = torch.ones(6)
    params[0].grad = torch.ones(6)
    opt.state[params[0]]["optx.adamr.anchor"] = torch.zeros(6)
    for count in (1.0, 2.0):
        opt.step()
        assert torch.equal(opt.state[params[0]]["optx.adamr.anchor"], torch.zeros(6))
        assert float(opt.state[params[0]]["step"]) == count


@pytest.mark.parametrize("which", ["weight", "exp_avg"])
def test_a_step_that_fails_on_an_expanded_tensor_is_taken_back(which: str) -> None:
    """torch refuses to write it; so it refused the writing back, and what came after stayed as it was."""
    params, opt = two(False)
    give(params)
    opt.step()
    if which == "weight":
        params[1].data = torch.ones(1).expand(4)
    else:
        opt.state[params[1]]["exp_avg"] = torch.ones(1).expand(4)
    before = [p.detach().clone() for p in params]
    moment = opt.state[params[0]]["exp_avg"].clone()
    give(params)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert torch.equal(opt.state[params[0]]["exp_avg"], moment)
    assert [float(opt.state[p]["step"]) for p in params] == [1.0, 1.0]


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_zerotensor_is_a_gradient_of_zeros(fused: Any) -> None:
    """What torch computes with it is float64 where a number per tensor is."""
    results = []
    for lazy in (True, False):
        params, opt = two(fused, optx.PerpGrad(), optx.AdamR())
        give(params)
        opt.step()
        params[0].grad = torch._efficientzerotensor((4,)) if lazy else torch.zeros(4)  # pyright: ignore
        opt.step()
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_a_step_without_gradients_after_a_skipped_first_one() -> None:
    """The skipped step's tables were taken for those of a group that has no gradient now."""
    params = [nn.Parameter(torch.arange(4.0) + i) for i in range(2)]
    base = torch.optim.AdamW([{"params": [p]} for p in params], lr=0.1)
    opt = optx.wrap(base, skip_nonfinite=True)
    params[0].grad = torch.full((4,), float("nan"))
    opt.step()
    assert opt.skipped_last
    params[0].grad, params[1].grad = None, torch.ones(4)
    opt.step()
    assert torch.equal(params[0], torch.arange(4.0))
    assert (params[1] < torch.arange(4.0) + 1).all()
