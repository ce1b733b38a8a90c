"""Binds the rules of a base's update: what each name is, and in which pass its sums are taken."""

from __future__ import annotations

from optx._rules import Rule
from optx.kernels.step.program import BASE_G, Call, G, Ref
from optx.step.bases import BaseRules, Sums
from optx.step.binding import REGISTERS
from optx.step.builder import Builder


def add_base(b: Builder, base: BaseRules, keeps_g: bool) -> None:
    """Add a base's update to the calls of a group's step.

    Args:
        b: what comes before is in it.
        base: the rules.
        keeps_g: whether rules after them read the gradient that they were given: they get one of their own.
    """
    names = _Names(b, base)
    if base.counted:
        b.level(0)  # whose scalars count
    for r in base.scalars:
        b.extend(max(len(b.levels) - 1, 0), scalars=[names.per_tensor(r)])
    for item in base.update:
        if isinstance(item, Sums):
            before = (*b.gradient, *b.weight, *b.base)
            level = b.sum_left(names.per_tensor(item.rule), before)
            if item.then is not None:
                b.scalar(names.per_tensor(item.then), level)
        else:
            b.base.append(names.per_element(item, keeps_g))


class _Names:
    """What the names in a base's rules are, as they come."""

    def __init__(self, b: Builder, base: BaseRules) -> None:
        self._b = b
        self._g = G
        self._cells = {name for name, slot in base.slots.items() if slot.scalar}
        self._made: dict[str, Ref] = {}  # locals; cells that were written

    def _read(self, name: str) -> Ref:
        if name == "g":
            return self._g
        if name == "fresh":
            return Ref("col", name)
        known = self._made.get(name) or REGISTERS.get(name) or self._b.common.get(name)
        return known or Ref("col", f"base.{name}")

    def per_element(self, r: Rule, keeps_g: bool) -> Call:
        """A rule that writes registers, state per element, or what later rules read of the element."""
        args = tuple(map(self._read, r.reads))
        if keeps_g and "g" in r.writes:
            self._g = BASE_G
        for name in r.writes:
            if name not in REGISTERS and name not in self._b.common:
                self._made[name] = Ref("local", f"base.{name}")
        return Call(r, args, tuple(map(self._read, r.writes)))

    def per_tensor(self, r: Rule) -> Call:
        """A rule that writes numbers per tensor: the base's cells among them are kept after the step."""
        args = tuple(map(self._read, r.reads))
        for name in r.writes:
            if name in self._cells:
                self._made[name] = Ref("col", name)
                if name not in self._b.kept:
                    self._b.kept.append(name)
        return Call(r, args, tuple(self._made.get(n) or Ref("col", f"base.{n}") for n in r.writes))
