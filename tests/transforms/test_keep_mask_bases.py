"""`optx.KeepMask` on every optimizer of the conformance table, and on some that mix weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from bases import BASES, BY_NAME, Base, make_net, through_a_file, train
from torch import Tensor, nn

import optx

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
STEPS = 20  # 200 were taken once: nothing changes after the first few


KEEPING = (
    *("AdamW", "SGD", "Adagrad", "Adadelta", "ASGD", "RMSprop", "torch_optimizer.MADGRAD"),
    *("schedulefree.AdamW", "schedulefree.SGD", "pytorch_optimizer.Lion", "transformers.Adafactor"),
)


def _other(name: str) -> Base:
    import pytorch_optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Base(name, lambda p: getattr(pytorch_optimizer, name)(list(p), lr=0.01))


# Their updates are dense, as Muon's is; SPlus averages the weights before anything could look at them.
MIXING = list(map(_other, ("SOAP", "SPlus")))


class Pruned(nn.Module):
    """Rows of 16 (packed), of 3 (bytes), and a bias, which has no mask."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.even = nn.Parameter(torch.randn(6, 16, generator=g))
        self.odd = nn.Parameter(torch.randn(5, 3, generator=g))
        self.bias = nn.Parameter(torch.randn(4, generator=g))
        self.masks = optx.Masks.from_bool(
            {name: torch.rand(p.shape, generator=g) > 0.5 for name, p in list(self.named_parameters())[:2]}
        )
        self.masks.apply_(self)

    def loss(self) -> Tensor:
        return sum(((p - 0.3) ** 2).sum() for p in self.parameters())  # type: ignore[return-value]


GRADIENTS = [
    [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for shape in ((6, 16), (5, 3), (4,))]
    for s in range(16)
]


def _steps(net: Pruned, opt: Any, count: int, closure: bool) -> None:
    if hasattr(opt, "train"):
        opt.train()

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = net.loss()
        loss.backward()
        return loss

    for step in range(count):
        if closure:
            opt.step(evaluate)
            continue
        for p, g in zip(net.parameters(), GRADIENTS[step % 16], strict=True):
            p.grad = g.clone()
        net.even.grad[~net.masks["even"]] = float("inf" if step % 2 else "nan")  # type: ignore[index]
        opt.step()


def _signed(net: Pruned) -> bool:
    named = list(net.named_parameters())[:2]
    return any(bool(torch.signbit(p.detach()[~net.masks[n]]).any()) for n, p in named)


@pytest.mark.parametrize("base", [*BASES, *MIXING], ids=str)
def test_no_zero_grows_back(base: Base) -> None:
    net = Pruned()
    start = net.even.detach().clone()
    fused = "auto" if base.name == "AdamW" else False  # that one path is like another: test_keep_mask.py
    opt = optx.wrap(base.make(net.parameters()), optx.KeepMask(net.masks, net), fused=fused)
    _steps(net, opt, 8 if base.closure else STEPS, base.closure)
    net.masks.verify(net)
    assert not _signed(net)
    kept = net.masks["even"]
    assert torch.isfinite(net.even).all()
    assert ((net.even.detach() != start) & kept).sum() > 0.9 * kept.sum()
    if hasattr(opt, "eval"):
        for switch in (opt.eval, opt.train):
            switch()
            net.masks.verify(net)


@pytest.mark.parametrize("name", KEEPING)
def test_state_from_before_the_pruning_is_masked(name: str) -> None:
    """Moments and averages that a base brings along; wrapped twice, resumed from a file."""
    net, base = Pruned(), BY_NAME[name]
    inner = base.make(net.named_parameters())
    if hasattr(inner, "train"):
        inner.train()
    for p, g in zip(net.parameters(), GRADIENTS[0], strict=True):
        p.grad = g.clone()
    for _ in range(3):
        inner.step()
    before = copy.deepcopy(inner.state_dict())
    net.masks.apply_(net)
    opt = optx.wrap(optx.wrap(inner, optx.KeepMask(net.masks), fused=False), optx.PerpGrad())
    _check_state(net, opt)
    _steps(net, opt, 6, False)
    net.masks.verify(net)
    opt.load_state_dict(through_a_file(opt.state_dict()))
    _steps(net, opt, 3, False)
    with pytest.warns(UserWarning, match=r"has no optx\.keep_mask\.kept"):
        opt.load_state_dict(before)
    _check_state(net, opt)
    _steps(net, opt, 2, False)
    net.masks.verify(net)


def _check_state(net: Pruned, opt: Any) -> None:
    """The names that are served by name only; what is not may be anything."""
    seen = 0
    for name, p in list(net.named_parameters())[:2]:
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "z", "x0", "sum", "square_avg"):
            value = opt.state.get(p, {}).get(key)
            if isinstance(value, Tensor) and value.shape == p.shape:
                seen += 1
                assert not value[~net.masks[name]].any(), key
                assert value[net.masks[name]].any(), key
    if "AdamW" in type(opt.base).__name__:
        assert seen


def test_a_whole_net() -> None:
    net = make_net()
    drawn = {n: torch.rand(p.shape) > 0.5 for n, p in net.named_parameters() if p.ndim == 2}
    masks = optx.Masks.from_bool(drawn)
    masks.apply_(net)
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), optx.KeepMask(masks), fused=False)
    train(net, opt, range(20))
    masks.verify(net)
    assert opt.keep_mask.current() == masks
