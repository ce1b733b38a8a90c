"""Collects the calls of one group's step, and finds how few passes serve all of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optx._rules import rule
from optx.kernels.step.program import Call, Fill, G, Level, Ref, needed
from optx.step.binding import GRAD_SQ

_STEP = Ref("col", "step")


@rule(writes="grad_sq")
def square(g: Any) -> Any:
    """Summed, the gradient's squared norm."""
    return g * g


@dataclass
class Builder:
    """Collects the calls of one group, level by level.

    Attributes:
        common: what every rule may read.
        closing: of transforms that enclose the others: after each gradient rule that is not theirs.
        depth: the level whose scalars the gradient rules so far depend on, plus one.
        grad_sq_level: where the col grad_sq, as it stands now in the chain, was computed.
        before: how many levels there are that do not see the base's update as rules after it do.
    """

    common: Mapping[str, Ref]
    levels: list[Level] = field(default_factory=list[Level])
    gradient: list[Call] = field(default_factory=list[Call])
    weight: list[Call] = field(default_factory=list[Call])
    base: list[Call] = field(default_factory=list[Call])
    after: list[Call] = field(default_factory=list[Call])
    observe: list[Call] = field(default_factory=list[Call])
    meter: list[Call] = field(default_factory=list[Call])
    kept: list[str] = field(default_factory=list[str])
    closing: list[Call] = field(default_factory=list[Call])
    depth: int = 0
    grad_sq_level: int = -1
    before: int = 0

    def level(self, index: int) -> Level:
        """One level, made if it is not there."""
        while len(self.levels) <= index:
            self.levels.append(Level())
        return self.levels[index]

    def extend(
        self,
        index: int,
        prefix: Iterable[Call] = (),
        sums: Iterable[Call] = (),
        scalars: Iterable[Call] = (),
        totals: Iterable[Ref] = (),
        finish: Iterable[Call] = (),
    ) -> None:
        """Put more into a level."""
        old = self.level(index)
        self.levels[index] = replace(
            old,
            prefix=(*old.prefix, *prefix),
            sums=(*old.sums, *sums),
            scalars=(*old.scalars, *scalars),
            totals=(*old.totals, *(t for t in totals if t not in old.totals)),
            finish=(*old.finish, *finish),
        )

    # ---- sums over the gradient ----------------------------------------------------------------------

    def need_grad_sq(self) -> int:
        """Make sure that the squared norm of the gradient as it stands is summed; give its level."""
        if self.grad_sq_level < 0:
            self.grad_sq_level = self.sum(Call(square, (G,), (GRAD_SQ,)))
        return self.grad_sq_level

    def sum(self, call: Call) -> int:
        """Take a sum over what the gradient rules so far make of the gradient; give its level."""
        level = self.level(self.depth)
        if level.sums and len(level.prefix) < len(self.gradient):
            self.depth += 1  # that pass sees an earlier gradient
            level = self.level(self.depth)
        if not level.sums:
            self.extend(self.depth, prefix=self.gradient)
        self.extend(self.depth, sums=[call])
        return self.depth

    # ---- sums over what the update makes -------------------------------------------------------------

    def sum_left(self, call: Call, calls: Sequence[Call], least: int = 0) -> int:
        """Take a sum over what some calls leave of the elements; give its level, which is ``least`` or later.

        It shares a pass with sums that see the same.
        """
        prefix = tuple(calls)
        read = [ref for c in (*needed(prefix, [call]), call) for ref in c.args]
        index = max([least, *(self.computed(ref) + 1 for ref in read)])
        while self.level(index).sums and self.levels[index].prefix != prefix:
            index += 1
        if not self.levels[index].sums:
            self.extend(index, prefix=prefix)
        self.extend(index, sums=[call])
        return index

    def fill(self, fill: Fill) -> None:
        """Call a function of whole matrices, once all numbers are there that what it is given depends on."""
        index = max([0, *(self.computed(ref) + 1 for call in fill.calls for ref in call.args)])
        old = self.level(index)
        self.levels[index] = replace(old, fills=(*old.fills, fill))

    def scalar(self, call: Call, least: int = 0) -> int:
        """Run a rule per tensor once all that it reads is there; give its level."""
        index = max([least, *map(self._readable, call.args)])
        self.extend(index, scalars=[call])
        return index

    def computed(self, ref: Ref) -> int:
        """The level that computes a number per tensor, or what functions of matrices make; -1: none does."""
        for index in reversed(range(len(self.levels))):
            level = self.levels[index]
            made = {ref for call in (*level.sums, *level.scalars, *level.finish) for ref in call.writes}
            made |= {fill.result for fill in level.fills}
            if ref in made or (ref.kind == "total" and ref.name in {t.name for t in level.totals}):
                return index
        return 0 if ref == _STEP else -1

    def _readable(self, ref: Ref) -> int:
        """The first level whose scalars can read a number."""
        index = max(self.computed(ref), 0)
        late = index < len(self.levels) and any(ref in call.writes for call in self.levels[index].finish)
        return index + (late or ref.kind == "total")
