"""Binds the rules of a base's update: what each name is, and in which pass its sums are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from optx._errors import OptxError, near
from optx._rules import Rule
from optx.kernels.step.program import BASE_G, Call, Fill, G, Kind, Ref, leading_to
from optx.step.base_update import BaseRules, Matrices, Sums
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
    if base.counts_tensors:
        b.level(0)  # whose scalars count
    for r in base.scalars:
        b.extend(max(len(b.levels) - 1, 0), scalars=[names.per_tensor(r)])
    for item in base.update:
        if isinstance(item, Sums):
            before = (*b.gradient, *b.weight, *b.base)
            level = b.sum_left(names.summed(item.rule, item.axis), before)
            if item.then is not None:
                level = b.scalar(names.summed(item.then, item.axis), level)
            if item.total is not None:
                b.scalar(names.per_tensor(item.total), level)
        elif isinstance(item, Matrices):
            b.fill(names.filled(item, (*b.gradient, *b.weight, *b.base)))
        else:
            b.base.append(names.per_element(item, keeps_g))


class _Names:
    """What the names in a base's rules are, as they come; `BaseRules` says what they mean."""

    def __init__(self, b: Builder, base: BaseRules) -> None:
        self._b, self._base = b, base
        self._g = G
        self._made: dict[str, Ref] = {}  # locals; numbers that were computed

    def _read(self, rule: Rule, name: str) -> Ref:
        if name == "g":
            return self._g
        if name == "fresh":
            return Ref("col", name)
        if name in self._base.slots and name not in self._made:
            kind = self._base.slots[name].kind
            if kind != "slot":
                return Ref(kind, name)
        known = REGISTERS.get(name) or self._made.get(name) or self._b.common.get(name)
        if known is None:
            names = [*REGISTERS, *self._made, *self._base.cells, *self._b.common]
            raise OptxError(
                f"optx: a base's rule {rule.name!r} reads {name!r}, which is no slot "
                f"{sorted(self._base.slots)}, number of the param group or earlier result. "
                f"{near(name, names)}"
            )
        return known

    def per_element(self, r: Rule, keeps_g: bool) -> Call:
        """A rule that writes registers, state per element, or what later rules read of the element."""
        args = tuple(self._read(r, name) for name in r.reads)
        if keeps_g and "g" in r.writes:
            self._g = BASE_G
        return Call(r, args, tuple(self._element(r, name) for name in r.writes))

    def _element(self, rule: Rule, name: str) -> Ref:
        if name == "g":
            return self._g
        if name == "w":
            return REGISTERS[name]
        if name in self._base.slots:
            return Ref("slot", name)
        made = self._made.setdefault(name, Ref("local", f"base.{name}"))
        if made.kind != "local":
            what = "a number that scalars" if made.kind == "col" else "which a function of matrices"
            raise OptxError(
                f"optx: a base's rule {rule.name!r} (update) writes {name!r}, {what} computed; give it "
                "another name."
            )
        return made

    def summed(self, r: Rule, axis: Kind | Literal[""]) -> Call:
        """A rule that writes sums, or numbers per tensor, row or column."""
        if not axis:
            return self.per_tensor(r)
        args = tuple(self._read(r, name) for name in r.reads)
        for name in r.writes:
            self._made[name] = Ref(axis, name if name in self._base.slots else f"base.{name}")
        return Call(r, args, tuple(self._made[name] for name in r.writes))

    def filled(self, item: Matrices, before: Sequence[Call]) -> Fill:
        """A function of whole matrices; what it makes is read from then on."""
        value, result = self._made[item.name], Ref("slot", f"base.{item.name}")
        self._made[item.name] = result
        dtype = str(item.dtype).removeprefix("torch.")
        return Fill(leading_to(before, [value]), value, result, item.function, dtype)

    def per_tensor(self, r: Rule) -> Call:
        """A rule that writes numbers per tensor: the base's cells among them are kept after the step."""
        args = tuple(self._read(r, name) for name in r.reads)
        for name in r.writes:
            cell = name in self._base.cells
            self._made[name] = Ref("col", name if cell else f"base.{name}")
            if cell and name not in self._b.kept:
                self._b.kept.append(name)
        return Call(r, args, tuple(self._made[name] for name in r.writes))
