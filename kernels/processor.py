"""What Numba compiles for: the processor that this runs on, or the one that ``NUMBA_CPU_NAME`` says."""

# Numba's insides have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportAttributeAccessIssue=false

from __future__ import annotations

from llvmlite import binding
from numba.core import config


def name() -> str:
    """LLVM's name for it, such as ``znver4``."""
    return config.CPU_NAME or binding.get_host_cpu_name()


def vectors() -> str:
    """The widest vector instructions that are used: ``AVX512``, ``AVX2``, or ``none of x86-64's``."""
    said: str | None = config.CPU_FEATURES
    features = (said or binding.get_host_cpu_features().flatten()).split(",")
    known = {"AVX512": "+avx512f", "AVX2": "+avx2"}
    return next((word for word, feature in known.items() if feature in features), "none of x86-64's")


def fetches_ahead() -> bool:
    """Whether its own prefetchers keep up with a loop over many arrays, so that hints only get in their way.

    Measured on one of AMD's (znver4), on one thread: an AdamW step takes 1.00 of torch's time without hints,
    1.15 with them; PerpGrad + AdamR 1.54 and 1.88. Where they were first measured they saved 7 %.
    """
    return name().startswith("znver")
