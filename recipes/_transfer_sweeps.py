"""The transfer recipe's sweeps: which runs are made, each width's around what was best at the one before."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._run import Run
from ._side_by_side import Processes
from ._transfer_curves import Found, Point

Work = Callable[[list[Point]], None]
STEP = {"lr": 1.0, "decay": 2.0}
"""Octaves between two runs of a sweep."""
REACH = 5
"""Sweeps go on beyond their ends while the least loss lies there, but not further than so many steps."""

LEFT_OUT = {("mup-linear", "lr")}
"""Sweeps that are not made, for time: the peer package's decay is only compared as decay."""


@dataclass
class Sweep:
    """One arm's sweep at one width.

    Args:
        arm: of the four.
        width: of the model.
        axis: what is swept, ``"lr"`` or ``"decay"``.
        other: logarithm of what is not.
        center: where it begins.
        reach: how many steps to each side are run at once.
        besides: what is run in any case: the narrowest width's best.
    """

    arm: str
    width: int
    axis: str
    other: float
    center: float
    reach: int
    besides: float | None = None

    def __post_init__(self) -> None:
        self._step = STEP[self.axis]
        self.at = {self.center + self._step * place for place in range(-self.reach, self.reach + 1)}
        self.at |= set() if self.besides is None else {self.besides}

    def points(self) -> list[Point]:
        """What is to be run."""
        one = (lambda x: (x, self.other)) if self.axis == "lr" else (lambda x: (self.other, x))
        return [Point(self.arm, self.width, *one(at)) for at in sorted(self.at)]

    def go_on(self, found: Found) -> bool:
        """Add the neighbours of the least point, if one is missing; whether one was."""
        least = found.best(self.arm, self.width, self.axis, self.other).grid
        around = {least - self._step, least + self._step}
        new = {at for at in around - self.at if abs(at - self.center) <= REACH * self._step}
        self.at |= new
        return bool(new)


def plan(widths: list[int], arms: list[str], start: tuple[float, float], found: Found, work: Work) -> None:
    """Make all runs: first the narrowest width's, then each wider one's around what was best before it.

    Args:
        widths: from the narrowest on.
        arms: which.
        start: logarithms of the rate and the decay to begin with.
        found: what there is by now; grows.
        work: makes those of these runs that there are not yet.
    """

    def swept(sweeps: list[Sweep]) -> None:
        going = sweeps
        while going:
            work([point for sweep in going for point in sweep.points()])
            going = [sweep for sweep in going if sweep.go_on(found)]

    log_lr, log_decay = start
    swept([Sweep(arms[0], widths[0], "lr", log_decay, log_lr, 2)])
    best_lr = found.best(arms[0], widths[0], "lr", log_decay).grid
    swept([Sweep(arms[0], widths[0], "decay", best_lr, log_decay, 2)])
    best_decay = found.best(arms[0], widths[0], "decay", best_lr).grid
    for before, width in itertools.pairwise(widths):
        sweeps: list[Sweep] = []
        for arm in arms:
            for axis, other, best in (("lr", log_decay, best_lr), ("decay", best_lr, best_decay)):
                if (arm, axis) not in LEFT_OUT:
                    center = found.best(arm, before, axis, other).grid
                    sweeps.append(Sweep(arm, width, axis, other, center, 1, best))
        swept(sweeps)


def run_all(
    run: Run, arms: list[str], args: Namespace, train: Callable[..., Any], processes: Processes
) -> None:
    """Make all runs, and write each when it ends.

    Args:
        run: where to.
        arms: which.
        args: the recipe's options.
        train: makes a run, from its point, its seed and what the processes have prepared.
        processes: where.
    """
    found = run.results["arms"]
    narrow = range(args.seed, args.seed + args.seeds)
    seeds = dict.fromkeys(args.widths, narrow) | {args.widths[-1]: narrow[: args.wide_seeds]}
    for arm in arms:
        for seed in narrow:
            found.setdefault(f"{arm}/{seed}", {})

    def work(points: list[Point]) -> None:
        jobs = [
            (point, seed)
            for point in dict.fromkeys(points)
            for seed in seeds[point.width]
            if point.name not in found[f"{point.arm}/{seed}"]
        ]
        ends = processes.each(train, jobs)
        for _ in run.steps(f"width {points[0].width}", 0, len(jobs)):
            place, result = next(ends)
            point, seed = jobs[place]
            found[f"{point.arm}/{seed}"][point.name] = result
            run.write()
        if run.interrupt.wanted:
            raise SystemExit(130)

    start = math.log2(args.lr), math.log2(args.decay)
    plan(args.widths, arms, start, Found(found, args.widths[0]), work)
