"""The table of `optx.Moments` on the Triton path, as `tests/step/test_moments.py` has it for the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import moment_rules as m
from moment_table import BASES, Table


@pytest.mark.parametrize(
    "base", [b for b in BASES if not b.endswith("nadam") and b not in ("radam", "adamw")]
)
def test_every_name_in_every_moment(base: str) -> None:
    Table([m.Names, m.Soften, m.SecondNames], base, "triton").run().check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_and_cells_of_every_dtype(dtype: torch.dtype) -> None:
    Table([m.Dtypes, m.Trace], "sgd", "triton", dtype).run().check()


def test_the_bases_state_in_every_moment() -> None:
    Table([m.Moving], "adamw", "triton").run().check()
