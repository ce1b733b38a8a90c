"""Takes a step's sums, totals and scalars, level by level over all groups.

Groups need not have the same levels: one may leave a transform out, or sum for its base. A total is complete
once every group that has a share in it has measured the level where it does; until then, whoever reads it
waits, and the others go on. All processes of a mesh have the same programs, and so the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optx.kernels.step.program import Program
from optx.step.foreach import GroupRun
from optx.step.sharded import Share, complete


class Party(Protocol):
    """One group, or several that share their kernels."""

    @property
    def program(self) -> Program:
        """What its step computes."""
        ...

    def sum(self, level: int) -> list[Share]:
        """A level's sums over shards, to be completed before `measure`."""
        ...

    def measure(self, level: int) -> list[dict[str, Any]]:
        """A level's sums and scalars; each group's shares of its totals by name."""
        ...

    def finish(self, level: int, totals: dict[str, Any]) -> None:
        """The scalars that waited for totals."""
        ...


class Loose:
    """A group whose base is run as it is.

    Args:
        run: what else its step computes.
        start: the weights as they were when the step began, once the base has moved them.
    """

    def __init__(self, run: GroupRun, start: Sequence[Tensor] | None = None) -> None:
        self._run, self._start = run, start
        self.program = run.program

    def sum(self, level: int) -> list[Share]:
        """See `Party`."""
        return self._run.sum(self.program.levels[level], self._start)

    def measure(self, level: int) -> list[dict[str, Any]]:
        """See `Party`."""
        return [self._run.measure(self.program.levels[level])]

    def finish(self, level: int, totals: dict[str, Any]) -> None:
        """See `Party`."""
        self._run.totals.update({name: torch.as_tensor(value) for name, value in totals.items()})
        self._run.finish(self.program.levels[level])


class Rounds:
    """Those of one step.

    Attributes:
        totals: the totals so far.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Any] = {}
        self._checked = False
        self._given: set[tuple[int, str]] = set()  # a party's shares: once each

    def take(self, parties: Sequence[Party], after: bool, check: Callable[[Any], None]) -> None:
        """Go through the levels that see the base's update, or through those before.

        Args:
            parties: all groups.
            after: whether it is the levels that see the base's update.
            check: told the total squared norm of the incoming gradients, where it is asked for.
        """
        queues = [[i for i, v in enumerate(p.program.levels) if v.after == after] for p in parties]
        waiting: set[int] = set()
        while any(queues):
            ready = [n for n, queue in enumerate(queues) if queue and n not in waiting]
            complete([share for n in ready for share in parties[n].sum(queues[n][0])])
            for n in ready:
                self._add(n, parties[n].measure(queues[n][0]))
            waiting.update(ready)
            missing = {
                t.name
                for n, (party, queue) in enumerate(zip(parties, queues, strict=True))
                for i in queue[n in waiting :]
                for t in party.program.levels[i].totals
                if (n, t.name) not in self._given
            }
            if not self._checked and "incoming_sq" in self.totals and "incoming_sq" not in missing:
                self._checked = True
                check(self.totals["incoming_sq"])
            done = [n for n in sorted(waiting) if not missing & _totals(parties[n], queues[n][0])]
            for n in done or sorted(waiting):
                parties[n].finish(queues[n].pop(0), self.totals)
                waiting.discard(n)

    def _add(self, n: int, shares: Sequence[dict[str, Any]]) -> None:
        """What a party's groups add to the totals."""
        names = {name for share in shares for name in share if (n, name) not in self._given}
        self._given.update((n, name) for name in names)
        for share in shares:
            for name in share.keys() & names:
                self.totals[name] = _sum(self.totals.get(name), share[name])


def _totals(party: Party, level: int) -> set[str]:
    return {t.name for t in party.program.levels[level].totals}


def _sum(a: Any, b: Any) -> Any:
    """Add shares of a total that may live on several devices."""
    if a is None:
        return b
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.device != b.device:
        return a + b.to(a.device)
    return a + b
