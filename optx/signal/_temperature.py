"""A temperature over the steps: constant, by a function, or warmed up and annealed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optx._errors import OptxError, check_range, check_whole

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Temperature:
    """What r is at a step; inf where nothing is to be weighted.

    Args:
        owner: whose errors they are.
        r: from ``warmup + anneal`` on; or a function of the step, from ``warmup`` on.
        warmup: steps, first, at ``warmup_r``, or at inf if that is None.
        warmup_r: above 0.
        anneal: steps after these in which it goes linearly from ``r_start`` to ``r``.
        r_start: above 0, finite.
    """

    owner: str
    r: float | Schedule
    warmup: int
    warmup_r: float | None
    anneal: int
    r_start: float | None

    def __post_init__(self) -> None:
        """Raise for what is out of range, or would have no effect."""
        for name, value in (("r", self.r), ("warmup_r", self.warmup_r), ("r_start", self.r_start)):
            if value is not None and not (name == "r" and callable(value)):
                check_positive(self.owner, name, value, math.inf)
        for name in ("warmup", "anneal"):
            object.__setattr__(self, name, check_whole(self.owner, name, getattr(self, name), 0))
        if self.warmup_r is not None and self.warmup == 0:
            raise OptxError(
                f"{self.owner}: warmup_r is {self.warmup_r!r} and warmup 0; give the number of steps too."
            )
        if (self.anneal > 0) != (self.r_start is not None):
            raise OptxError(
                f"{self.owner}: anneal is {self.anneal!r} and r_start {self.r_start!r}; give both, or none: "
                "r goes from r_start to r over anneal steps."
            )
        if self.anneal and (callable(self.r) or math.inf in (self.r, self.r_start)):
            raise OptxError(
                f"{self.owner}: anneal goes between two finite numbers, r_start and r; r is {self.r!r} and "
                f"r_start {self.r_start!r}."
            )

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        if step < self.warmup:
            return math.inf if self.warmup_r is None else self.warmup_r
        if callable(self.r):
            r = self.r(step)
            check_positive(self.owner, f"r({step})", r, math.inf)
            return float(r)
        done = step - self.warmup
        if self.r_start is None or done >= self.anneal:
            return float(self.r)
        return self.r_start + (self.r - self.r_start) * done / self.anneal


def check_positive(owner: str, name: str, value: Any, most: float) -> None:
    """Raise unless ``0 < value <= most``."""
    if isinstance(value, int | float) and value <= 0:
        raise OptxError(f"{owner}: {name} is {value!r}; it must be above 0.")
    check_range(owner, name, value, 0.0, most)
