"""Each base that has rules, in generated Triton code against the CPU kernels' and the library's own step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Bucket, Setup

import optx
from optx.kernels.step.triton import TritonStep

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer as p
    import torch_optimizer as t

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
o = torch.optim
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "NAdam": lambda w: o.NAdam(w, lr=0.05, weight_decay=0.1),
    "RAdam": lambda w: o.RAdam(w, lr=0.05, betas=(0.9, 0.9)),  # from its third step on it adapts
    "Adamax": lambda w: o.Adamax(w, lr=0.05),
    "RMSprop": lambda w: o.RMSprop(w, lr=0.01, centered=True, momentum=0.9),
    "Adagrad": lambda w: o.Adagrad(w, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda w: o.Adadelta(w, lr=0.5),
    "Rprop": lambda w: o.Rprop(w, lr=0.05),
    "ASGD": lambda w: o.ASGD(w, lr=0.05, lambd=0.01, t0=1),
    "Lion": lambda w: p.Lion(w, lr=0.05, weight_decay=0.1),
    "AdaBelief": lambda w: p.AdaBelief(w, lr=0.05, weight_decay=0.1, ams_bound=True),
    "Yogi": lambda w: p.Yogi(w, lr=0.05),
    "Adan": lambda w: p.Adan(w, lr=0.05, weight_decay=0.1),
    "NovoGrad": lambda w: p.NovoGrad(w, lr=0.05, weight_decay=0.1),
    "torch_optimizer.AdaBelief": lambda w: t.AdaBelief(w, lr=0.05, amsgrad=True),
    "torch_optimizer.NovoGrad": lambda w: t.NovoGrad(w, lr=0.05, amsgrad=True, grad_averaging=True),
}


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("name", BASES)
def test_a_librarys_step(name: str) -> None:
    setup = Setup(BASES[name], [40, 3], offsets=(0, 1))
    bucket = Bucket(setup, lambda *args: TritonStep(*args, "cpu"))
    reference = [torch.nn.Parameter(w.clone()) for w in bucket.weights]
    base = BASES[name](reference)
    for _ in range(6 if name == "RAdam" else 3):
        gradients = bucket.gradients()
        bucket.step(gradients)
        for weight, g in zip(reference, gradients, strict=True):
            weight.grad = g.clone()
        base.step()
    torch.testing.assert_close(bucket.weights, [w.detach() for w in reference], rtol=1e-5, atol=2e-6)
    assert bucket.band.intact()


def test_torchs_muon() -> None:
    """Its products take stacks that kernels fill and read."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((6, 9), (9, 6), (6, 9))]
    ours, own = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    opt, base = optx.wrap(o.Muon(ours, lr=0.02), fused="triton"), o.Muon(own, lr=0.02)
    for _ in range(3):
        for a, b in zip(ours, own, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        opt.step()
        base.step()
    assert opt.plan()[0].path == "fused triton"
    torch.testing.assert_close(ours, own, rtol=0, atol=3 * 0.02 * 2.0**-8)
    assert not any(torch.equal(a, w) for a, w in zip(ours, start, strict=True))
