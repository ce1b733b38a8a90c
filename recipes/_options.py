"""Types of the recipes' options, and what argparse says in one line of what does not fit them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of option: whole numbers from `least` on."""
    wanted = f"a whole number from {least} on" if most is None else f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {wanted}") from None
        if found < least or (most is not None and found > most):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {wanted}")
        return found

    return read


def number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """A type of option: finite numbers that fit, and in words which do."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and fits(found)):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {wanted}")
        return found

    return read


positive = whole(1)
first_seed = whole(0, 2**32 - 1)  # all that draw take these
rate = number("a number above 0", lambda x: x > 0)
strength = number("a number from 0 on", lambda x: x >= 0)
share = number("a share between 0 and 1", lambda x: 0 < x < 1)
SEEDS: dict[str, Any] = {"type": positive, "help": "how many seeds, from --seed on"}


def path(text: str) -> Path:
    """A type of option: a file or folder; ~ is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
