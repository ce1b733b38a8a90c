"""All that is public, loaded for who looks through names or classes: some of it waits for its first use."""

from __future__ import annotations

import sys


def load() -> None:
    """Load every public name of optx."""
    optx = sys.modules["optx"]  # which has begun, if this has; importing it here would close a circle
    for name in dir(optx):
        getattr(optx, name)
