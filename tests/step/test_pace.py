"""`optx.step.pace`: launches in backward wake other threads while that pays, and no number shows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optx
from optx.step.pace import Ways

NUMEL = 1000


def alone_of(ways: Ways, launches: int, together: float, alone: float) -> float:
    """The share of so many launches that ran alone, where the two ways take that many seconds."""
    taken = 0
    for _ in range(launches):
        way = ways.choose(NUMEL)
        taken += way
        ways.learn(way, NUMEL, alone if way else together)
    return taken / launches


def test_the_faster_way_is_taken_and_the_other_one_looked_at() -> None:
    ways = Ways()
    assert 0 < alone_of(ways, 300, together=1e-4, alone=1e-3) < 0.01  # ten times as long: seldom tried
    assert alone_of(ways, 300, together=5e-3, alone=1e-3) > 0.5  # a load came
    assert 0.98 < alone_of(ways, 300, together=5e-3, alone=1e-3) < 1
    alone_of(ways, 3000, together=1e-4, alone=1e-3)  # and went
    assert 0 < alone_of(ways, 300, together=1e-4, alone=1e-3) < 0.01


def test_the_difference_must_be_worth_it() -> None:
    assert alone_of(Ways(), 300, together=1.1e-3, alone=1e-3) < 0.05


def test_one_long_wait_changes_little() -> None:
    ways = Ways()
    alone_of(ways, 300, together=6e-4, alone=9e-4)
    ways.learn(False, NUMEL, 5e-3)
    assert alone_of(ways, 100, together=6e-4, alone=9e-4) < 0.05


def trained(released: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(257, 257), nn.Linear(257, 257, bias=False))
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), fused=True)
    handle = opt.release(net) if released else None
    for step in range(4):
        x = torch.randn(3, 257, generator=torch.Generator().manual_seed(step))
        if handle is None:
            net(x).square().mean().backward()
        else:
            with handle:
                net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in net.parameters()]


def test_either_way_gives_the_ordinary_steps_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[bool] = []
    choose, threads = Ways.choose, torch.get_num_threads()

    def seen(self: Ways, numel: int) -> bool:
        ways.append(choose(self, numel))
        return ways[-1]

    monkeypatch.setattr(Ways, "choose", seen)
    torch.set_num_threads(2)
    try:
        found, expected = trained(True), trained(False)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, expected))
    assert {True, False} == set(ways)  # both have run, on the two large tensors
