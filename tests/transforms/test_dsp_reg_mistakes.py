"""What goes wrong with DSP-Reg in a loop or at wrap, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optx


def _block(opt: optx.Wrapped, p: Tensor, label: Any = 0) -> None:
    with opt.dsp_reg.domain(label):
        p.sum().backward()


def _nested(opt: optx.Wrapped, p: Tensor) -> None:
    with opt.dsp_reg.domain(0), opt.dsp_reg.domain(1):
        pass


def _step_inside(opt: optx.Wrapped, p: Tensor) -> None:
    with opt.dsp_reg.domain(0):
        p.sum().backward()
        opt.step()


def _empty(opt: optx.Wrapped, p: Tensor) -> None:
    with opt.dsp_reg.domain(0):
        pass


def _sparse(opt: optx.Wrapped, p: Tensor) -> None:
    with opt.dsp_reg.domain(0):
        p.grad = torch.ones_like(p).to_sparse()


def _clipped_between(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, 0)
    nn.utils.clip_grad_norm_([p], 0.1)
    _block(opt, p, 1)


def _outside_between(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, 0)
    p.grad = torch.ones_like(p)
    _block(opt, p, 1)


def _twice(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, 0)
    _block(opt, p, 0)


def _tensor_label(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, torch.tensor(0))


def _emptied_between(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, 0)
    opt.zero_grad()
    _block(opt, p, 1)
    opt.step()


def _missing(opt: optx.Wrapped, p: Tensor) -> None:
    _block(opt, p, 0)
    opt.step()


def _stepped_twice(opt: optx.Wrapped, p: Tensor) -> None:
    for d in (0, 1):
        _block(opt, p, d)
    opt.step()
    opt.step()


def _no_zero_grad(opt: optx.Wrapped, p: Tensor) -> None:
    for d in (0, 1):
        _block(opt, p, d)
    opt.step()
    _block(opt, p, 0)


def _no_blocks(opt: optx.Wrapped, p: Tensor) -> None:
    p.sum().backward()
    opt.step()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda opt, p: _block(opt, p, 2), r"domain\(2\) was never declared; the domains are 0, 1"),
        (lambda opt, p: _block(opt, p, "a"), r"domain\('a'\) was never declared"),
        (_tensor_label, r"domain\(tensor\(0\)\) was never declared.*give label\.item\(\)"),
        (lambda opt, p: _block(opt, p, [0]), r"domain\(\[0\]\) was never declared"),
        (_nested, r"domain\(1\) was entered while another domain is open"),
        (_step_inside, r"step\(\) was called inside a domain's block"),
        (_empty, r"domain\(0\) left no gradient"),
        (_sparse, r"domain\(0\) left a sparse gradient"),
        (_clipped_between, r"gradients were changed between domain\(0\) and domain\(1\)"),
        (_outside_between, r"gradients were changed between domain\(0\) and domain\(1\)"),
        (_twice, r"domain\(0\) came a second time before step\(\)"),
        (_emptied_between, r"step\(\) came before domain\(0\).*zero_grad\(\) between two of them"),
        (_missing, r"step\(\) came before domain\(1\) \(1 of 2 are missing\)"),
        (_stepped_twice, r"step\(\) came without domains"),
        (_no_zero_grad, r"there are gradients already before domain\(0\)"),
        (_no_blocks, r"step\(\) came without domains"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    mistake: Callable[[optx.Wrapped, Tensor], None], words: str
) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.5), optx.DSPReg(2))
    with pytest.raises(optx.OptxError, match=words):
        mistake(opt, p)
    steps = 0.5 if mistake in (_stepped_twice, _no_zero_grad) else 0.0
    assert torch.equal(p, torch.full((3, 3), 1.0 - steps))
    opt.zero_grad()  # and the loop may go on
    for d in (0, 1):
        _block(opt, p, d)
    opt.step()
    assert torch.equal(p, torch.full((3, 3), 0.5 - steps))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domains": 0}, "domains is 0"),
        ({"domains": "abc"}, "domains is 'abc'"),
        ({"domains": ["a", "a"]}, "each once"),
        ({"domains": [[1], [2]]}, r"domains is \[\[1\], \[2\]\]"),
        ({"domains": 2, "weight": -1.0}, "weight is -1.0; it must be at least 0"),
        ({"domains": 2, "ema": 1.5}, "ema is 1.5; it must be between 0 and 1"),
        ({"domains": 2, "warmup": -1}, "warmup is -1"),
        ({"domains": 2, "norm": "sum"}, "norm is 'sum'"),
        ({"domains": 2, "anchor": "zero"}, "anchor is 'zero'"),
        ({"domains": 2, "decoupled": "no"}, "decoupled is 'no'"),
        ({"domains": 2, "min_dim": -1}, "min_dim is -1"),
        ({"domains": 2, "min_dim": 1.5}, r"min_dim is 1\.5; it must be a whole number"),
        ({"domains": 2, "model": "net"}, "model is a str"),
        ({"domains": 2, "weight": True}, "weight is True; it must be a number"),
        ({"domains": 2, "eps": 0.0}, r"eps is 0\.0; it must be at least 1e-30"),
    ],
)
def test_an_argument_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.DSPReg(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    assert optx.DSPReg(np.int64(2), weight=np.float32(0.5), min_dim=np.int64(1)).domains == (0, 1)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (lambda loss: {0: loss, 2: loss}, r"domain\(2\) was never declared"),
        (lambda loss: [loss, loss], "backward.. was given list, and takes a dict"),
        (lambda loss: {}, "takes a dict of each domain's loss"),
        (lambda loss: {0: loss, 1: loss * torch.ones(2)}, r"the loss of 1 has shape \(2,\)"),
        (lambda loss: {0: loss, 1: 1.0}, "the loss of 1 has float"),
    ],
)
def test_losses_are_looked_at_before_the_first_backward(losses: Callable[[Tensor], Any], words: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.5), optx.DSPReg(2))
    loss = p.sum()
    with pytest.raises(optx.OptxError, match=words):
        opt.dsp_reg.backward(losses(loss))
    assert p.grad is None
    opt.dsp_reg.backward({0: loss, 1: 2 * loss})
    opt.step()


@pytest.mark.parametrize("norm", ["mean", "layer", "max"])
def test_the_smallest_eps_keeps_equal_domains_exact(norm: Any) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.5), optx.DSPReg(2, norm=norm, eps=1e-30))
    for d in (0, 1):
        _block(opt, p, d)
    opt.step()
    assert torch.equal(p, torch.full((3, 3), 0.5))


def test_what_cannot_be_served() -> None:
    other, mine = nn.Embedding(3, 3), nn.Linear(3, 3)
    with pytest.raises(optx.TransformError, match="no parameter of model, a Embedding, is in the optimizer"):
        optx.wrap(torch.optim.SGD(mine.parameters(), lr=0.1), optx.DSPReg(2, model=other))
    bias = nn.Parameter(torch.ones(3))
    with pytest.raises(optx.TransformError, match="nothing to regularise"):
        optx.wrap(torch.optim.SGD([bias], lr=0.1), optx.DSPReg(2))
    w = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(optx.TransformError, match="maximize=True"):
        optx.wrap(torch.optim.SGD([w], lr=0.1, maximize=True), optx.DSPReg(2))
    optx.wrap(torch.optim.SGD([w], lr=0.1, maximize=True), optx.DSPReg(2, decoupled=True))
    with pytest.raises(optx.OptxError, match="needs the optimizer"), optx.DSPReg(2).domain(0):
        pass
