"""DSP-Reg's rules in Triton's interpreter, beside the CPU kernels on the same variances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Bucket, Setup

from optx.kernels.step.cpu import CpuStep
from optx.kernels.step.triton import TritonStep
from optx.transforms.dsp_reg import DSPReg

VARIANTS: dict[str, dict[str, Any]] = {
    "mean, after": {"decoupled": True},
    "mean, in the gradient, from an anchor": {"decoupled": False, "anchor": "init"},
    "layer": {"norm": "layer", "decoupled": False},
    "none, after, to an anchor": {"norm": "none", "anchor": "init", "decoupled": True, "weight": 30.0},
}


def run(runner: Any, options: dict[str, Any]) -> Bucket:
    setup = Setup(lambda p: torch.optim.AdamW(p, lr=0.05), [0, 7, 1025], [DSPReg(2, **options)])
    bucket = Bucket(setup, runner)
    for step in range(2):
        for i, state in enumerate(bucket.state):
            g = torch.Generator().manual_seed(10 * step + i)
            state["dsp_reg.spread"].copy_(torch.rand(state["dsp_reg.spread"].shape, generator=g))
            state["dsp_reg.chosen"].fill_(0.0 if i == 1 else 1.0)
        bucket.step(bucket.gradients())
    return bucket


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("name", VARIANTS)
def test_triton_is_the_cpu(name: str) -> None:
    ours, cpu = (run(runner, VARIANTS[name]) for runner in (lambda *args: TritonStep(*args, "cpu"), CpuStep))
    torch.testing.assert_close(ours.weights, cpu.weights, rtol=0, atol=2e-6)
    for a, b in zip(ours.state, cpu.state, strict=True):
        torch.testing.assert_close(a["dsp_reg.sensitivity"], b["dsp_reg.sensitivity"], rtol=1e-6, atol=1e-7)
        assert float(a["dsp_reg.count"]) == float(b["dsp_reg.count"]) == 2.0
    off = run(CpuStep, {**VARIANTS[name], "weight": 0.0})
    assert torch.equal(cpu.weights[1], off.weights[1])  # it was not chosen
    assert float((cpu.weights[2] - off.weights[2]).abs().max()) > 1e-3
