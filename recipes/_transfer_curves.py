"""The transfer recipe's results as curves, and where between their points the least loss lies."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_NAME = re.compile(r"width (\d+), lr 2\^(\S+), decay 2\^(\S+)")


class Point(NamedTuple):
    """One run, but for its seed; rate and decay as logarithms to base 2."""

    arm: str
    width: int
    log_lr: float
    log_decay: float

    @property
    def lr(self) -> float:
        """Of the narrowest width."""
        return 2.0**self.log_lr

    @property
    def decay(self) -> float:
        """The same."""
        return 2.0**self.log_decay

    @property
    def name(self) -> str:
        """As results.json has it, within its arm."""
        return f"width {self.width}, lr 2^{self.log_lr:.6g}, decay 2^{self.log_decay:.6g}"


class Optimum(NamedTuple):
    """Where a curve is least, by a parabola.

    Attributes:
        at: the vertex of the parabola through the least point and both its neighbours.
        loss: its value there.
        grid: the least point itself.
        inside: False if the least point is the last one of the sweep, or has a neighbour that diverged, so
            that there is no parabola and ``at`` is ``grid``.
    """

    at: float
    loss: float
    grid: float
    inside: bool


Curve = Mapping[float, float]
"""Loss by the logarithm of what is swept; inf where a run diverged."""


def optimum(curve: Curve) -> Optimum:
    """Where a curve is least."""
    xs = sorted(curve)
    place = min(range(len(xs)), key=lambda i: curve[xs[i]])
    best = xs[place]
    edge = Optimum(best, curve[best], best, inside=False)
    if not 0 < place < len(xs) - 1:
        return edge
    a, b, c = xs[place - 1 : place + 2]
    left, right = ((curve[x] - curve[b]) / (x - b) for x in (a, c))
    if not math.isfinite(right - left):
        return edge
    bend = (right - left) / (c - a)
    if bend == 0.0:  # as low on both sides: flat
        return Optimum(best, curve[best], best, inside=True)
    slope = left - bend * (a - b)
    shift = -slope / (2 * bend)
    return Optimum(b + shift, curve[b] + (slope + bend * shift) * shift, best, inside=True)


@dataclass(frozen=True)
class Found:
    """What was run: the part of results.json that is by arm and seed.

    Args:
        arms: by ``arm/seed``, by the point's name, ``loss`` (None: diverged) and ``top``.
        narrowest: width at which all arms are the same run, which is made in one of them only.
    """

    arms: Mapping[str, Mapping[str, Any]]
    narrowest: int

    def of(self, arm: str, width: int) -> Iterable[tuple[int, float, float, Any]]:
        """Seed, both logarithms and result of each run of an arm at a width."""
        for key, runs in self.arms.items():
            name, _, seed = key.rpartition("/")
            if name == arm or width == self.narrowest:
                for point, result in runs.items():
                    at = _NAME.fullmatch(point)
                    if at and int(at[1]) == width:
                        yield int(seed), float(at[2]), float(at[3]), result

    def curves(self, arm: str, width: int, axis: str, other: float) -> dict[int, dict[float, float]]:
        """By seed, the losses of a sweep; ``other`` is the logarithm of what is not swept."""
        found: dict[int, dict[float, float]] = {}
        for seed, lr, decay, result in self.of(arm, width):
            at, fixed = (lr, decay) if axis == "lr" else (decay, lr)
            if math.isclose(fixed, other, abs_tol=1e-4):
                loss = math.inf if result["loss"] is None else result["loss"]
                found.setdefault(seed, {})[at] = loss
        return found

    def mean(self, arm: str, width: int, axis: str, other: float) -> dict[float, float]:
        """The mean of these over seeds, where all seeds were run."""
        curves = list(self.curves(arm, width, axis, other).values())
        shared = set.intersection(*map(set, curves)) if curves else set[float]()
        return {at: statistics.mean(curve[at] for curve in curves) for at in sorted(shared)}

    def best(self, arm: str, width: int, axis: str, other: float) -> Optimum:
        """Where the mean is least."""
        return optimum(self.mean(arm, width, axis, other))

    def tops(self, arm: str, width: int, log_lr: float, log_decay: float) -> dict[int, list[float]]:
        """By seed, the top singular values of one point's hidden matrices; none of runs that diverged."""
        wanted = Point(arm, width, log_lr, log_decay).name
        found = ((seed, Point(arm, width, *at).name, r) for seed, *at, r in self.of(arm, width))
        return {seed: r["top"] for seed, name, r in found if name == wanted and r["loss"] is not None}
