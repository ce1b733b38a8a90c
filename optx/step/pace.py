"""Whether waking other threads for a small launch pays, as the launches before it have shown.

A launch on several threads ends when the last of them has been there, be all work done long before. On free
cores that costs microseconds; where other processes want the cores, a thread waits for its turn, some
milliseconds. One launch over all tensors waits once, hundreds of launches in backward wait each time: on two
cores with a load of three, 211 tensors of 135 million numbers took 1.1 s one by one, 0.16 s at once, and
0.17 s one by one on the calling thread. Which it is, only the clock knows. How work is split shows in no
number, so trying both ways changes none.
"""

from __future__ import annotations

import time

import torch

from optx.kernels.step.runner import Step

TRIED = 1 / 30  # of the time goes into the way that was slower when it was last tried
GAIN = 0.8  # the part of all threads' time below which one thread is taken
USED, OTHER = 1 / 32, 1 / 8  # the newest launch's part in what a way is taken to cost: of many, and of few


class Pace:
    """Runs launches on all threads or on the calling one, whichever has been faster for such sizes.

    The slower way is tried again for a thirtieth of the time: loads come and go.
    """

    def __init__(self) -> None:
        self._ways: dict[int, Ways] = {}  # by binary orders of magnitude

    def step(self, runner: Step, numel: int) -> None:
        """``runner.step()``, of so many elements."""
        if not runner.parallel or torch.get_num_threads() == 1:
            runner.step()
            return
        ways = self._ways.setdefault(numel.bit_length(), Ways())
        runner.alone = alone = ways.choose(numel)
        start = time.perf_counter()
        runner.step()
        runner.alone = False
        ways.learn(alone, numel, time.perf_counter() - start)


class Ways:
    """What an element's step costs on all threads, and alone."""

    def __init__(self) -> None:
        self._costs: dict[bool, float] = {}  # by whether it is alone
        self._counts = {False: 0, True: 0}
        self._alone = False  # the faster way
        self._spent = 0.0  # on it since the other was tried

    def choose(self, numel: int) -> bool:
        """Whether the next launch runs alone."""
        for way in (False, True):
            if way not in self._costs:
                return way
        due = self._spent * TRIED >= self._costs[not self._alone] * numel
        return self._alone is not due

    def learn(self, alone: bool, numel: int, seconds: float) -> None:
        """A launch has taken so long."""
        used = alone is self._alone
        self._spent = self._spent + seconds if used else 0.0
        self._counts[alone] += 1
        cost = seconds / numel
        before = self._costs.get(alone, cost)
        newest = max(USED if used else OTHER, 1 / self._counts[alone])
        self._costs[alone] = before + newest * (cost - before)
        if len(self._costs) == 2:
            self._alone = self._costs[True] < GAIN * self._costs[False]
