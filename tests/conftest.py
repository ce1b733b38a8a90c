"""Settings of every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave the cores to other workers

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests import their shared tables by name

from whose_warnings import pytest_collection, pytest_runtest_protocol  # noqa: F401

settings.register_profile(
    "optx", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("optx")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Never what another test left; tests of threads ask for two themselves.

    Two workers with two OpenMP threads each would wait for one another on a machine of two cores.
    """
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def one_thread(_threads: None) -> None:
    """Where tensors are tiny: two threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_compiled_stays() -> Iterator[None]:
    """While something is compiled, `optx.attach` looks for it among all objects: 0.2 s late in a run."""
    yield
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


# The longest, half a minute and more each: begun last, one would leave the other worker idle.
LONGEST = (
    "test_triton_step.py",
    "test_every_run_resumed_in_a_new_process",
    "test_fsdp2",
    "test_ddp_and_fsdp2",
    "test_processes_without_a_home_or_a_whole_numba_or_at_once",
    "test_two_processes.py",
    "test_memory_is_that_of_pieces",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; else in the order of the files."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
