"""What `Wrapped.metrics` tells of a step in Triton: sums that ride in the update, and leave it as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

SIZES = (1030, 8, 0, 1)


def stepped(fused: Any, dtype: torch.dtype, rounding: str, metrics: bool) -> tuple[list[nn.Parameter], Any]:
    """A step on weights that are aligned and one that is not, far from their anchor."""
    g = torch.Generator().manual_seed(0)
    buffers = [torch.randn(n + 1, generator=g).to(dtype) for n in SIZES]
    parameters = [nn.Parameter(b[i == 1 :][: len(b) - 1]) for i, b in enumerate(buffers)]
    base = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0, maximize=True)
    chain = [optx.PerpGrad(), optx.AdamR(weight=0.05, anchor="zero")]
    opt = optx.wrap(base, *chain, fused=fused, rounding=rounding, metrics=metrics)  # type: ignore[arg-type]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g).to(dtype)
    opt.step()
    return parameters, opt


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.float64, "nearest"),
        (torch.bfloat16, "kahan"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_metered_sums(dtype: torch.dtype, rounding: str) -> None:
    weights, opt = stepped("triton", dtype, rounding, metrics=True)
    plain, _ = stepped("triton", dtype, rounding, metrics=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    found = opt.metrics()
    gradients = [p.grad for p in weights if p.grad is not None]
    assert found["optx/grad_norm"] == pytest.approx(norm(gradients), rel=1e-6)
    rests = [opt.state[p].get("optx.kahan", torch.zeros(())) for p in weights]
    kept = [w.detach().float() + rest.float() for w, rest in zip(weights, rests, strict=True)]
    assert found["adamr/distance"] == pytest.approx(norm(kept), rel=1e-6)
    if dtype == torch.float32:
        assert found == pytest.approx(stepped("cpu", dtype, rounding, metrics=True)[1].metrics(), rel=1e-6)
