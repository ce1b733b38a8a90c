"""The table of `optx.Moments` on the Triton path, as `tests/step/test_moments.py` has it for the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import moment_rules as m
from documented import documented
from moment_table import Table
from torch import nn

import optx


# The gradient as it is; one of the base's own, and a first step that differs; and all of Adam's state. How
# bases come into a program is the CPU's table to hold.
@pytest.mark.long(keep=2)
@pytest.mark.parametrize("base", ["sgd", "sgd nesterov maximize l2", "adam l2 amsgrad"])
def test_every_name_in_every_moment(base: str) -> None:
    Table([m.Names, m.Soften, m.SecondNames], base, "triton").run(2).check()


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_and_cells_of_every_dtype(dtype: torch.dtype) -> None:
    Table([m.Dtypes, m.Trace], "sgd", "triton", dtype).run(2).check()


def test_the_bases_state_in_every_moment() -> None:
    Table([m.Moving], "adamw", "triton").run(2).check()


def test_counters_and_sums_after_the_update(tmp_path: Path) -> None:
    """The documentation's Lookahead and cautious update, one over the other."""
    Lookahead, Cautious = (
        documented(optx.counter, tmp_path).Lookahead,
        documented(optx.Moments, tmp_path).Cautious,
    )
    found: list[list[torch.Tensor]] = []
    for fused in (False, "triton"):
        weights = [nn.Parameter(torch.linspace(-1.0, 1.0, n)) for n in (7, 1500)]
        opt = optx.wrap(
            torch.optim.SGD(weights, lr=0.1, momentum=0.9), Cautious(), Lookahead(k=2), fused=fused
        )
        for step in range(4):
            for p in weights:
                p.grad = torch.cos(torch.arange(len(p)) * (step + 1.0))
            opt.step()
        found.append([p.detach() for p in weights])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
