"""Moments of 8 bits and weights in two parts: Triton's kernels beside the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import optx
from optx.kernels.step.cpu import CpuStep
from optx.kernels.step.layout import Layout
from optx.kernels.step.triton import TritonStep
from optx.step.formats import decode, encode, split

EIGHT = ("signed8", "nonnegative8")
ADAMW = optx.wrap(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.0)).program(0)
NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
LAYOUTS = [
    Layout(("float32", "float32", *EIGHT), "nearest", True),
    Layout(("bfloat16", "bfloat16", *EIGHT), "split8", True),
    Layout(("bfloat16", "float32", "float32", "float32"), "split16", True),
]


def stepped(count: int, layout: Layout, runner: Any, **more: Any) -> dict[str, Tensor]:
    """All that is kept after one step."""
    random = torch.Generator().manual_seed(0)
    w, m, v, g = (torch.randn(count, generator=random) for _ in range(4))
    kept = {"g": g.to(getattr(torch, layout.dtypes[1])), "step": torch.zeros(()), "w": w}
    if layout.rounding.startswith("split"):
        kept["w"], kept["rest"] = split(w, int(layout.rounding.removeprefix("split")))
    for name, x, moment in (("exp_avg", m, "signed"), ("exp_avg_sq", v.square(), "nonnegative")):
        kept[name] = x
        if layout.dtypes[2] in EIGHT:
            kept[name], kept[f"{name}.scale"] = encode(x, moment)
    step = runner(ADAMW, layout, [count], [0], **more)
    step.tensors[0, :-1] = [kept[r].data_ptr() for r in (*step.columns.roles, *step.columns.cells)]
    step.hypers[:] = [NUMBERS[name] for name in step.columns.hypers]
    step.set_key(3)
    step.step()
    return kept


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dtypes[0]} {layout.rounding}")
@pytest.mark.parametrize("count", [33, 600])
def test_triton_keeps_what_the_cpu_keeps(layout: Layout, count: int) -> None:
    """Codes are rounded by other draws, to one of the two beside the number; all else is the same."""
    ours = stepped(count, layout, TritonStep, device="cpu", block=256, chunk=4096)
    theirs = stepped(count, layout, CpuStep)
    for name, t in ours.items():
        if t.dtype in (torch.int8, torch.uint8) and name != "rest":
            distance = (t.int() - theirs[name].int()).abs()
            assert distance.max() <= 1
            assert 0 < distance.float().mean() < 0.7
        else:
            assert torch.equal(t, theirs[name]), name


def test_draws_are_even() -> None:
    """What is stored has the number as its mean."""
    layout = LAYOUTS[0]
    kept = stepped(4096, layout, TritonStep, device="cpu", block=1024, chunk=4096)
    wanted = stepped(4096, Layout(("float32",) * 4, "nearest", True), CpuStep)
    error = decode(kept["exp_avg"], kept["exp_avg.scale"]) - wanted["exp_avg"]
    nearest = decode(*encode(wanted["exp_avg"], "signed")) - wanted["exp_avg"]
    assert error.mean().abs() < 5 * error.std() / 64
    assert 1.2 < error.std() / nearest.std() < 2.2
