"""Settings of every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests import their shared tables by name

settings.register_profile(
    "optx", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("optx")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Two, as on the smallest machine the project is tested on, and never what another test left."""
    torch.set_num_threads(2)
