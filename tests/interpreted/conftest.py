"""These tests run Triton kernels in its interpreter, which has to be chosen before Triton is imported."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """A device gives inf and nan without a word; numpy, on which the interpreter runs, warns."""
    with np.errstate(all="ignore"):
        yield
