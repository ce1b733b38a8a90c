"""Settings of every test."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave the cores to other workers
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process that tests start would compile all of optx

import pytest
import torch
from hypothesis import HealthCheck, settings

from optx import _everything

sys.path.insert(0, str(Path(__file__).parent))  # tests import their shared tables by name

from processes import done  # noqa: F401
from whose_warnings import pytest_collection, pytest_runtest_protocol  # noqa: F401

# The same examples in every run, so that its failures can be repeated; with --hypothesis-seed they are drawn.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "drawn", settings.get_profile("fixed"), derandomize=False, database=None, print_blob=True
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Without it the tests marked ``long`` are left out."""
    parser.addoption("--long", type=int, metavar="N", help="also one in N of the long tests; 1 is all")
    parser.addoption("--long-by", default="", metavar="WORD", help="which of them: another word draws others")


def pytest_configure(config: pytest.Config) -> None:
    """Choose hypothesis's profile; xdist hands its workers the options."""
    config.addinivalue_line("markers", "jobs(*jobs): what the fixture done has several processes do")
    config.addinivalue_line(
        "markers",
        "long(keep): goes through a whole scenario for seconds; see --long. With keep=N a"
        " function's first case is not long, nor is about one in N of the others",
    )
    _everything.load()  # tables of tests look through vars(optx)
    settings.load_profile("fixed" if config.option.hypothesis_seed is None else "drawn")


@pytest.fixture
def drawn_seed(request: pytest.FixtureRequest) -> int | None:
    """The seed of this run's examples; None where they are fixed."""
    seed = request.config.option.hypothesis_seed
    return None if seed is None else zlib.crc32(str(seed).encode())


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


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A gloo group of this process alone, which outlives what the test has made.

    A DistributedDataParallel that is the last to hold a group waits, with the GIL, for gloo's threads, which
    may wait for the GIL.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _nothing_compiled_stays() -> Iterator[None]:
    """While something is compiled, `optx.attach` looks for it among all objects: 0.2 s late in a run."""
    yield
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart() -> None:
    """What is imported and collected stays: nobody needs to look through a million objects for dead ones."""
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Nor afterwards: a look through all takes a second, and some tests, and calls of optx, ask for one."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Else bindings complain, at Python's end, of what was not freed."""
    gc.unfreeze()


# The longest, half a minute and more each: begun last, one would leave the other worker idle.
LONGEST = (
    "test_triton_step.py",
    "test_every_run_resumed_in_a_new_process",
    "test_processes_without_a_home_or_a_whole_numba_or_at_once",
    "test_memory_is_that_of_pieces",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What several processes do first, as the first of these tests waits for all; then the longest."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    families: set[str] = set()
    for item in items:
        marks = list(item.iter_markers("long"))
        family = item.nodeid.partition("[")[0]
        one_in = max((mark.kwargs.get("keep", sys.maxsize) for mark in marks), default=1)
        first = family not in families and all("keep" in mark.kwargs for mark in marks)
        families.add(family)
        # By its name's digest, else a table's columns would be kept, or its rows, and not a bit of each.
        is_kept = first or zlib.crc32(item.nodeid.encode()) % one_in == 0
        (kept if is_kept or _drawn(item, config) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    items.sort(key=lambda item: item.get_closest_marker("jobs") is None)


def _drawn(item: pytest.Item, config: pytest.Config) -> bool:
    """Is a long test among those that this run takes? Every worker must find the same."""
    one_in: int | None = config.option.long
    word = config.option.long_by
    return one_in is not None and zlib.crc32(f"{word} {item.nodeid}".encode()) % one_in == 0
