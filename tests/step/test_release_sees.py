"""Released steps compare each tensor with what it was: all that is changed between two of them is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

GRADS = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 16).reshape(4, 4)
        self.weights = nn.ParameterList(nn.Parameter(start * (i + 1)) for i in range(3))

    def forward(self, grads: Tensor) -> Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, grads, strict=True)]).sum()


Run = tuple[Net, Any]


def start(released: bool) -> Run:
    net = Net()
    groups = [{"params": list(net.weights[:2])}, {"params": [net.weights[2]], "lr": 0.02}]
    opt = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    if not released:
        return net, opt
    wrapped = optx.wrap(opt, fused=True)
    wrapped.release(net)
    return net, wrapped


def step(run: Run, number: int) -> None:
    net, opt = run
    opt.zero_grad()
    with getattr(opt, "released", None) or contextlib.nullcontext():
        net(GRADS[number]).backward()
    opt.step()


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def other_memory(net: Net, opt: Any) -> None:
    net.weights[0].data = net.weights[0].data + 1


def other_order(net: Net, opt: Any) -> None:
    net.weights[0].data = net.weights[0].data.t().contiguous().t()


def other_state(net: Net, opt: Any) -> None:
    opt.state[net.weights[1]]["exp_avg"] = torch.ones(4, 4)
    opt.state[net.weights[2]] = {k: v.clone() for k, v in opt.state[net.weights[2]].items()}
    opt.state[net.weights[0]]["exp_avg_sq"].data = torch.ones(4, 4)


def no_state(net: Net, opt: Any) -> None:
    opt.state.clear()


def loaded(net: Net, opt: Any) -> None:
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["exp_avg"] = entry["exp_avg"] * 2
    opt.load_state_dict(saved)


def other_numbers(net: Net, opt: Any) -> None:
    opt.param_groups[0].update(lr=0.03, betas=(0.8, 0.9))
    opt.param_groups[1]["weight_decay"] = 0.5


def numbers_in_place(net: Net, opt: Any) -> None:
    opt.param_groups[0]["lr"].fill_(0.04)
    opt.param_groups[0]["betas"][0] = 0.7


def mutable_numbers(net: Net, opt: Any) -> None:
    opt.param_groups[0].update(lr=torch.tensor(0.01), betas=[0.9, 0.999])


def frozen(net: Net, opt: Any) -> None:
    net.weights[1].requires_grad_(False)


def thawed(net: Net, opt: Any) -> None:
    net.weights[1].requires_grad_(True)


EDITS: dict[str, list[Callable[[Net, Any], None]]] = {
    "weights": [other_memory, other_order],
    "state": [other_state, no_state, loaded],
    "numbers": [other_numbers, mutable_numbers, numbers_in_place],
    "trained": [frozen, thawed],
}


@pytest.mark.parametrize("edits", EDITS)
def test_what_is_changed_between_steps_is_seen(edits: str) -> None:
    """After two steps that found all as it was, by which the comparison was in force."""
    runs = [start(released) for released in (False, True)]
    number = 0
    for edit in [None, *EDITS[edits]]:
        if edit is not None:
            for net, opt in runs:
                edit(net, opt)
        for _ in range(4 if edit is None else 2):
            for run in runs:
                step(run, number)
            number += 1
        for (net, opt), (other, released) in [runs]:
            assert all(map(close, net.weights, other.weights)), edit
            for p, q in zip(net.weights, other.weights, strict=True):
                kept = released.state[q]
                assert all(close(t, kept[name]) for name, t in opt.state[p].items()), edit


def test_a_gradient_that_comes_to_lie_on_the_weight_is_refused() -> None:
    run = start(released=True)
    for number in range(4):
        step(run, number)
    net, opt = run
    assert opt.released is not None
    net.weights[0].grad = net.weights[0].data  # autograd adds the incoming one to it in place
    before = net.weights[0].detach().clone()
    with pytest.raises(optx.OptxError, match="can't be stepped in backward"), opt.released:
        net(GRADS[4]).backward()
    assert torch.equal(net.weights[0], before + GRADS[4, 0])  # autograd's doing
