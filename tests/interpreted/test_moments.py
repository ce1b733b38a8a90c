"""The table of `optx.Moments` on the Triton path, as `tests/step/test_moments.py` has it for the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import moment_rules as m
from moment_table import Table


# The gradient as it is; one of the base's own, and a first step that differs; and all of Adam's state. How
# bases come into a program is the CPU's table to hold.
@pytest.mark.parametrize("base", ["sgd", "sgd nesterov maximize l2", "adam l2 amsgrad"])
def test_every_name_in_every_moment(base: str) -> None:
    Table([m.Names, m.Soften, m.SecondNames], base, "triton").run(2).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_and_cells_of_every_dtype(dtype: torch.dtype) -> None:
    Table([m.Dtypes, m.Trace], "sgd", "triton", dtype).run(2).check()


def test_the_bases_state_in_every_moment() -> None:
    Table([m.Moving], "adamw", "triton").run(2).check()
